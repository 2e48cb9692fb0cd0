"""One conversion: located, described, planned, carried out, uploaded.

The Python functions, the command line and conversions by rank all go through :class:`Conversion`. A whole model is the
part of rank 0 of 1; several ranks have a folder each, and :mod:`quarkconv.convert.ranks` keeps those together.
"""

from __future__ import annotations

from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quarkconv.convert.jobs import DEFAULT_JOBS, MAX_JOBS
from quarkconv.convert.options import Options
from quarkconv.convert.output import output_location
from quarkconv.convert.planner import make_plan
from quarkconv.convert.results import ConversionResult, RankOutput, conversion_json
from quarkconv.errors import UsageError
from quarkconv.findings import Finding
from quarkconv.hub.locate import Located, check_repo_id, locate
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.plan import Plan, plan_digest
from quarkconv.plan.shares import Share, ShareWork
from quarkconv.progress import SILENT, Progress
from quarkconv.targets import get_target

if TYPE_CHECKING:
    from quarkconv.write.joining import Joined


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that has been planned. Make one with :meth:`prepare`.

    Attributes:
        source: the model that is converted.
        location: directory of the output, or its URL in an object store.
        outputs: one for each rank; a whole model has a single one.
        experts, intermediate: E and I of the whole model.
        push: Hub repo id that the output is uploaded to; a finished output is then kept, so that an upload resumes.
    """

    source: Located
    location: Path | str
    outputs: tuple[RankOutput, ...]
    experts: int
    intermediate: int
    push: str | None = None

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
                by rank, which is not uploaded.
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
        location = output_location(source, f"{target}{ranks[0].suffix()}", out)
        if isinstance(location, str) and (push is not None or len(ranks) > 1):
            raise UsageError(
                "The output must be a directory",
                file=location,
                expected="--out DIR with --push, --tp and --ep",
                hint="convert to a directory, and copy it with the store's own tools",
            )
        description = options.describe(source.files, progress)
        outputs = []
        for rank in ranks:
            plan = make_plan(
                description, row, options.shard_bytes, rank=rank, base_model=source.repo, options=options.of_source
            )
            outputs.append(RankOutput(plan, location if rank.is_whole else Path(location) / rank.folder()))
        layer = description.int8_layers[0]
        return cls(source, location, tuple(outputs), layer.experts, layer.intermediate, push)

    @property
    def by_rank(self) -> bool:
        """Whether the experts are divided among ranks."""
        return not self.outputs[0].plan.rank.is_whole

    @property
    def output_bytes(self) -> int:
        """Bytes that all plans write."""
        return sum(part.plan.output_bytes for part in self.outputs)

    def run(
        self,
        *,
        jobs: int = DEFAULT_JOBS,
        overwrite: bool = False,
        progress: Progress = SILENT,
    ) -> ConversionResult:
        """Carry out the plans. The same call resumes after a failure or an interrupt.

        Args:
            jobs, overwrite, progress: as of :func:`convert_checkpoint`.

        Raises:
            UsageError: ``jobs`` is out of range, or the output directory holds something else.
            SourceError: the source changed, or cannot be read.
            UnsupportedError: the data of the source does not meet a check of the plan.
            WriteError: writing failed.
            InterruptedByUser: interrupted.
        """
        from quarkconv.write.executor import execute
        from quarkconv.write.output import finished_output

        require_jobs(jobs)
        digests = [plan_digest(output.plan) for output in self.outputs]
        finished: list[Manifest | None] = [None] * len(self.outputs)
        if (self.by_rank or self.push is not None) and not overwrite:
            finished = [
                finished_output(output.location, digest) for output, digest in zip(self.outputs, digests, strict=True)
            ]
        if self.by_rank:
            from quarkconv.convert.ranks import prepare_folders, write_index

            self._check_rows(jobs)
            prepare_folders(Path(self.location), self.outputs, finished, overwrite=overwrite)
        progress.step(f"Converting to {self.outputs[0].plan.target}", self.output_bytes, "byte")
        manifests = []
        for output, digest, manifest in zip(self.outputs, digests, finished, strict=True):
            if manifest is not None:
                progress.advance(output.plan.output_bytes)
            manifests.append(
                manifest
                or execute(
                    output.plan,
                    self.source.files,
                    output.location,
                    digest=digest,
                    jobs=jobs,
                    overwrite=overwrite,
                    progress=progress,
                )
            )
        if self.by_rank:
            write_index(Path(self.location), self.outputs, manifests, self.experts, self.intermediate)
        return self._result(*manifests)

    def _check_rows(self, jobs: int) -> None:
        """Check the rows that will be quantized for all ranks, before the first is written."""
        from quarkconv.write.checks import check_float_rows
        from quarkconv.write.opening import open_source

        for plan in (output.plan for output in self.outputs if output.plan.options.quantizes):
            with closing(open_source(self.source.files, plan)) as sources:
                check_float_rows(plan, sources, jobs)

    def run_share(
        self, share: Share, *, jobs: int = DEFAULT_JOBS, progress: Progress = SILENT
    ) -> ConversionResult | None:
        """Carry out one share of the plan; the last one finishes the conversion. The same call resumes.

        Processes that have the output directory in common, on one machine or several, may each run a share at the same
        time, without talking to each other. The output equals that of :meth:`run`.

        Args:
            share: the share.
            jobs: threads that read and write.
            progress: receives how far writing has come.

        Returns:
            The result, if the conversion is finished; None while other shares are missing.

        Raises:
            UsageError, SourceError, UnsupportedError, WriteError, InterruptedByUser: as :meth:`run`; and another
                process works on the share.
        """
        from quarkconv.write.output import finished_output
        from quarkconv.write.shares import execute_share

        plan, work = self._only_plan(), self._work(share)
        require_jobs(jobs)
        digest = plan_digest(plan)
        manifest = finished_output(self.location, digest)
        progress.step(f"Converting part {share} to {plan.target}", work.nbytes, "byte")
        if manifest is None:
            try:
                manifest = execute_share(
                    plan, self.source.files, self.location, work, digest=digest, jobs=jobs, progress=progress
                )
            except UsageError:  # another process may have finished the conversion meanwhile
                manifest = finished_output(self.location, digest)
                if manifest is None:
                    raise
        return None if manifest is None else self._result(manifest)

    def run_on_ray(
        self, address: str = "auto", *, jobs: int = DEFAULT_JOBS, progress: Progress = SILENT
    ) -> ConversionResult:
        """Carry out the plan as tasks of a Ray cluster, one for each shard. The same call resumes.

        All nodes must see the source and the output under the same names.

        Args:
            address: of the cluster: ``auto``, ``local``, ``HOST:PORT`` or ``ray://HOST:PORT``.
            jobs: threads of a task.
            progress: receives how far all tasks have come.

        Raises:
            UsageError, SourceError, UnsupportedError, WriteError, InterruptedByUser: as :meth:`run`; and Ray is not
                installed, or the cluster cannot be reached.
        """
        from quarkconv.convert.on_ray import execute_on_ray
        from quarkconv.write.output import finished_output

        plan = self._only_plan()
        require_jobs(jobs)
        digest = plan_digest(plan)
        manifest = finished_output(self.location, digest)
        progress.step(f"Converting to {plan.target} on Ray", sum(shard.nbytes for shard in plan.shards), "byte")
        if manifest is None:
            manifest = execute_on_ray(
                plan,
                self.source.files,
                self.location if isinstance(self.location, str) else self.location.absolute(),
                digest=digest,
                jobs=jobs,
                address=address,
                progress=progress,
            )
        return self._result(manifest)

    def join(self, *, jobs: int = DEFAULT_JOBS, progress: Progress = SILENT) -> tuple[ConversionResult | None, Joined]:
        """Work on the plan together with other processes until it is carried out. Any may begin and end at any time.

        Each takes shards by leases. A shard of a process that died is written by another one. The output equals that of
        :meth:`run`.

        Returns:
            The result, if this process saw the conversion finished; and what it wrote.

        Raises:
            UsageError, SourceError, UnsupportedError, WriteError, InterruptedByUser: as :meth:`run`; and the object
                store has no conditional writes.
        """
        from quarkconv.write.joining import Joined, execute_joined
        from quarkconv.write.output import finished_output

        plan = self._only_plan()
        require_jobs(jobs)
        digest = plan_digest(plan)
        manifest = finished_output(self.location, digest)
        progress.step(f"Converting to {plan.target} with others", plan.output_bytes, "byte")
        if manifest is not None:
            return self._result(manifest), Joined(manifest, 0, 0)
        joined = execute_joined(plan, self.source.files, self.location, digest=digest, jobs=jobs, progress=progress)
        return None if joined.manifest is None else self._result(joined.manifest), joined

    def finish(self, *, jobs: int = DEFAULT_JOBS, progress: Progress = SILENT) -> ConversionResult:
        """Finish a conversion whose shares are all written, where the last :meth:`run_share` could not.

        Raises:
            UsageError: nothing was begun in the output directory.
            SourceError, UnsupportedError, InterruptedByUser: as :meth:`run`.
            WriteError: shares are missing, or writing failed.
        """
        from quarkconv.write.output import finished_output
        from quarkconv.write.shares import finish_shares

        plan = self._only_plan()
        require_jobs(jobs)
        digest = plan_digest(plan)
        manifest = finished_output(self.location, digest)
        progress.step("Finishing", self.output_bytes, "byte")
        if manifest is None:
            manifest = finish_shares(
                plan, self.source.files, self.location, digest=digest, jobs=jobs, progress=progress
            )
        return self._result(manifest)

    def _work(self, share: Share) -> ShareWork:
        return share.work(self._only_plan())

    def _only_plan(self) -> Plan:
        if self.by_rank:
            raise UsageError(
                "Conversions by rank are not divided into parts",
                expected="--part, --join, --ray or --finish without --tp and --ep",
                found="both",
                hint="run one conversion by rank on each machine, or convert without --tp and --ep",
            )
        return self.outputs[0].plan

    def _result(self, *manifests: Manifest) -> ConversionResult:
        return ConversionResult(self.source.origin, self.location, self.outputs, manifests)

    def create_repo(self, *, private: bool = False, progress: Progress = SILENT) -> None:
        """Create the repo that the output is uploaded to, if any: a refusal should come before the conversion.

        Args:
            private: whether a new repo is private; an existing one is not changed.
            progress: receives that the Hub is contacted.

        Raises:
            WriteError: the Hub refuses.
        """
        if self.push is not None:
            from quarkconv.hub.push import create_repo

            progress.step("Contacting the Hub")
            create_repo(self.push, private=private)

    def upload(self, result: ConversionResult, *, bars: bool = False) -> dict[str, str]:
        """Upload the output to the repo that :meth:`create_repo` created, if any.

        Args:
            result: the finished conversion.
            bars: whether huggingface_hub shows progress bars.

        Returns:
            The URL of the repo under ``pushed``; empty without a repo.

        Raises:
            WriteError: the upload failed; the same command resumes.
        """
        if self.push is None:
            return {}
        from quarkconv.hub.push import upload_folder

        message = f"{result.plan.target} by quarkconv, plan {result.manifest.plan[:12]}"
        return {"pushed": upload_folder(result.output, self.push, message, bars=bars)}

    @property
    def losses(self) -> tuple[Finding, ...]:
        """Settings and tensors of the source that the target does not keep."""
        return self.outputs[0].plan.losses

    def to_json(self, share: Share | None = None, *, dry_run: bool = True) -> dict[str, Any]:
        """The object that ``convert --json`` prints while the conversion is not finished."""
        value = conversion_json(self.source.origin, self.location, self.outputs, dry_run=dry_run)
        return value if share is None else value | self._work(share).to_json() | {"finished": False}


def require_jobs(jobs: int) -> None:
    """Raise :class:`UsageError` unless a number of threads is in range."""
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError("`jobs` is out of range", expected=f"1 to {MAX_JOBS}", found=str(jobs))
