"""One conversion: located, described, planned, carried out.

The Python functions and the command line go through :class:`Conversion`. A whole model is the part of rank 0 of 1;
several ranks have a folder each, which :mod:`quarkconv.write.ranks` writes and indexes.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quarkconv.convert.jobs import DEFAULT_JOBS, require_jobs
from quarkconv.convert.options import Options
from quarkconv.convert.output import folder_in, output_location
from quarkconv.convert.planner import plans_of
from quarkconv.convert.results import ConversionResult, Outcome, RankOutput, conversion_json
from quarkconv.errors import UsageError, naming_files_in
from quarkconv.hub.locate import Located, check_repo_id, locate
from quarkconv.plan.plan import plan_digest
from quarkconv.plan.shares import Share
from quarkconv.progress import SILENT, Progress
from quarkconv.targets import get_target
from quarkconv.write.execution import Execution
from quarkconv.write.modes import Contribution, Mode, Whole
from quarkconv.write.output import output_at
from quarkconv.write.write import write_output


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that has been planned. Make one with :meth:`prepare`.

    Attributes:
        source: the model that is converted.
        location: directory of the output, or its URL in an object store.
        outputs: one for each rank; a whole model has a single one.
    """

    source: Located
    location: Path | str
    outputs: tuple[RankOutput, ...]

    @classmethod
    def prepare(
        cls,
        model: str | Path,
        target: str,
        out: str | Path | None = None,
        options: Options = Options(),  # noqa: B008
        *,
        cache: bool = False,
        push: str | None = None,
        progress: Progress = SILENT,
    ) -> Conversion:
        """Locate and describe a model, check that it can be converted, and plan it. Nothing is written.

        Args:
            model, target, out, cache, progress: as of :func:`quarkconv.convert_checkpoint`.
            options: what to write.
            push: Hub repo id that the output will be uploaded to.

        Raises:
            UsageError, SourceError, UnsupportedError: as :func:`convert_checkpoint`; an invalid repo id; a conversion
                by rank, which is not uploaded; ``cache`` with a local model.
        """
        ranks = options.ranks
        if push is not None:
            check_repo_id(push)
            if len(ranks) > 1:
                raise UsageError(
                    "Conversions by rank are not uploaded",
                    expected="--push without --tp and --ep",
                    found="both",
                    hint="engines load whole models: convert without --tp and --ep to upload",
                )
        row = get_target(target)
        source = locate(model, cache=cache, progress=progress)
        if cache and source.repo is None and source.files.root.is_dir():
            raise UsageError(
                "--cache has no effect with a local model",
                expected="a Hub repo id, or no --cache",
                found=f"the directory {source.files.root}",
                hint="leave out --cache",
            )
        location = output_location(source, f"{target}{ranks[0].suffix()}", out)
        if isinstance(location, str) and push is not None:
            raise UsageError(
                "--push uploads a directory",
                expected="--out DIR",
                found=f"--out {location}",
                hint="convert to a directory with --push, or to the URL without it",
            )
        outputs = tuple(
            RankOutput(plan, location if plan.rank.is_whole else folder_in(location, plan.rank.folder()))
            for plan in plans_of(source, row, options, ranks, progress)
        )
        return cls(source, location, outputs)

    @property
    def by_rank(self) -> bool:
        """Whether the experts are divided among ranks."""
        return not self.outputs[0].plan.rank.is_whole

    def carry_out(
        self,
        mode: Mode = Whole(),  # noqa: B008
        *,
        jobs: int = DEFAULT_JOBS,
        progress: Progress = SILENT,
    ) -> Outcome:
        """Carry out the plans, or this process's part of them. The same call resumes after a failure or an interrupt.

        All modes write the same bytes.

        Args:
            mode: how this process carries them out; by default, it writes everything.
            jobs: threads that read and write.
            progress: receives how far writing has come.

        Raises:
            UsageError: ``jobs`` is out of range, the output holds something else, or a conversion by rank is divided
                among processes.
            SourceError: the source changed, or cannot be read.
            UnsupportedError: the data of the source does not meet a check of the plan.
            WriteError: writing failed, or another process works on the output.
            InterruptedByUser: interrupted.
        """
        require_jobs(jobs)
        executions = [self._execution(output, jobs, progress) for output in self.outputs]
        with naming_files_in(self.source.origin):
            if self.by_rank:
                from quarkconv.write.ranks import write_ranks

                manifests = write_ranks(self.location, executions, overwrite=self._whole(mode).overwrite)
                written = Contribution(None)
            else:
                written = write_output(executions[0], mode)
                manifests = [] if written.manifest is None else [written.manifest]
        result = ConversionResult(self.source.origin, self.location, self.outputs, tuple(manifests))
        return Outcome(mode, result if manifests else None, written.shards, written.nbytes)

    def _execution(self, output: RankOutput, jobs: int, progress: Progress) -> Execution:
        return Execution(
            output.plan, plan_digest(output.plan), self.source.files, output_at(output.location), jobs, progress
        )

    def to_json(self, mode: Mode = Whole(), *, dry_run: bool = True) -> dict[str, Any]:  # noqa: B008
        """The object that ``convert --json`` prints while the conversion is not finished."""
        value = conversion_json(self.source.origin, self.location, self.outputs, dry_run=dry_run)
        if not isinstance(mode, Share):
            return value
        if self.by_rank:
            self._whole(mode)
        return value | mode.work(self.outputs[0].plan).to_json() | {"finished": False}

    def _whole(self, mode: Mode) -> Whole:
        """The mode of a conversion by rank, which is not divided among processes."""
        if not isinstance(mode, Whole):
            raise UsageError(
                "Conversions by rank are not divided into parts",
                expected="--part, --join, --ray or --finish without --tp and --ep",
                found="both",
                hint="run one conversion by rank on each machine, or convert without --tp and --ep",
            )
        return mode
