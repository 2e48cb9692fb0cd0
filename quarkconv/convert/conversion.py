"""One conversion: located, described, planned, carried out, uploaded.

The Python functions, the command line and conversions by rank all go through :class:`Conversion`. A whole model is the
part of rank 0 of 1; several ranks have a folder each, and :mod:`quarkconv.convert.ranks` keeps those together.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quarkconv.convert.output import output_directory
from quarkconv.convert.planner import make_plan
from quarkconv.convert.results import ConversionResult, Part, conversion_json
from quarkconv.convert.shard_size import DEFAULT_SHARD_SIZE, parse_size
from quarkconv.description.description import Description, describe
from quarkconv.description.mtp import KEEP, QUANTIZE, parse_mtp
from quarkconv.description.quantized import Quantize, quantized_description
from quarkconv.errors import UsageError
from quarkconv.experts.ranks import ranks_of
from quarkconv.findings import Finding
from quarkconv.hub.locate import Located, check_repo_id, locate
from quarkconv.plan.plan import Plan
from quarkconv.plan.shares import Share
from quarkconv.progress import SILENT, Progress
from quarkconv.targets import get_target

if TYPE_CHECKING:
    from quarkconv.plan.manifest import Manifest

DEFAULT_JOBS: Final = 4
"""Threads of a conversion: they mostly wait for the disk, so that two cores serve four of them."""
MAX_JOBS: Final = 64


def plan_conversion(
    model: str | Path,
    target: str,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    tp: int = 1,
    ep: int = 1,
    rank: int = 0,
    quantize: Quantize | None = None,
    scheme: str | None = None,
    mtp: str = KEEP,
    progress: Progress = SILENT,
) -> Plan:
    """Plan a conversion: pure data, no tensor data is read.

    Args:
        model: directory or Hub repo id.
        target: name of the target, such as ``fused-int8``.
        max_shard_size: largest size of a shard's data, in bytes or as ``5GB`` or ``512MiB``.
        tp, ep: number of tensor parallel or expert parallel ranks that the experts are divided among.
        rank: the rank whose part is planned.
        quantize: ``missing`` quantizes the float modules that the config declares quantized, ``all`` every linear that
            engines run in int8, to ptpc_int8; None quantizes nothing.
        scheme: scheme of the int8 modules where config.json does not declare one: ``ptpc_int8``.
        mtp: ``keep`` the layers of multi-token prediction as they are, ``drop`` them, or ``quantize`` their float
            linears to ptpc_int8.
        progress: receives how far reading the headers has come.

    Raises:
        UsageError: no such target or rank, or an invalid size.
        SourceError: the source is damaged or inconsistent.
        UnsupportedError: the source is not INT8, or the target cannot represent it.
    """
    ranks = ranks_of(tp, ep)
    if not 0 <= rank < len(ranks):
        raise UsageError("There is no such rank", expected=f"0 to {len(ranks) - 1}", found=str(rank))
    row, size = get_target(target), parse_size(max_shard_size)
    source = locate(model, progress=progress)
    description = _description(source, quantize, scheme, mtp, progress)
    return make_plan(description, row, size, rank=ranks[rank], base_model=source.repo)


def convert_checkpoint(
    model: str | Path,
    target: str,
    out: str | Path | None = None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    tp: int = 1,
    ep: int = 1,
    quantize: Quantize | None = None,
    scheme: str | None = None,
    mtp: str = KEEP,
    jobs: int = DEFAULT_JOBS,
    overwrite: bool = False,
    cache: bool = False,
    progress: Progress = SILENT,
) -> ConversionResult:
    """Convert a checkpoint. The source is only read; memory does not grow with the model.

    Args:
        model: directory or Hub repo id. A model on the Hub is read by byte ranges and not stored, unless the Hub's
            cache holds it already.
        target: name of the target, such as ``fused-int8``.
        out: directory to create; by default ``<model>-<target>`` beside the model.
        max_shard_size: largest size of a shard's data, in bytes or as ``5GB`` or ``512MiB``.
        tp, ep: number of tensor parallel or expert parallel ranks that the experts are divided among; with more than
            one, ``out`` has a folder for each rank.
        quantize, scheme: see :func:`plan_conversion`.
        mtp: ``keep`` the layers of multi-token prediction as they are, ``drop`` them, or ``quantize`` their float
            linears to ptpc_int8.
        jobs: threads that read and write.
        overwrite: replace an earlier conversion in ``out``.
        cache: download a model to the Hub's cache, and convert it from there.
        progress: receives how far the download, reading the headers and writing have come.

    Raises:
        UsageError, SourceError, UnsupportedError: as :func:`plan_conversion`; and ``out`` holds something else.
        WriteError: writing failed; the same call resumes.
        InterruptedByUser: interrupted; the same call resumes.
    """
    conversion = Conversion.prepare(
        model,
        target,
        out,
        max_shard_size=max_shard_size,
        tp=tp,
        ep=ep,
        quantize=quantize,
        scheme=scheme,
        mtp=mtp,
        cache=cache,
        progress=progress,
    )
    return conversion.run(jobs=jobs, overwrite=overwrite, progress=progress)


def _description(
    source: Located, quantize: Quantize | None, scheme: str | None, mtp: str, progress: Progress
) -> Description:
    """The source as it is, or as it will be with some of its float modules quantized."""
    description = describe(source.files, progress, scheme=scheme, mtp=parse_mtp(mtp))
    if quantize is not None:
        return quantized_description(description, quantize)
    return quantized_description(description, "mtp") if mtp == QUANTIZE else description


@dataclass(frozen=True, slots=True)
class Conversion:
    """A conversion that has been planned. Make one with :meth:`prepare`.

    Attributes:
        source: the model that is converted.
        output: directory of the output.
        parts: what each rank gets; a single part of a whole model.
        experts, intermediate: E and I of the whole model.
        push: Hub repo id that the output is uploaded to; a finished output is then kept, so that an upload resumes.
    """

    source: Located
    output: Path
    parts: tuple[Part, ...]
    experts: int
    intermediate: int
    push: str | None = None

    @classmethod
    def prepare(
        cls,
        model: str | Path,
        target: str,
        out: str | Path | None = None,
        *,
        max_shard_size: int | str = DEFAULT_SHARD_SIZE,
        tp: int = 1,
        ep: int = 1,
        quantize: Quantize | None = None,
        scheme: str | None = None,
        mtp: str = KEEP,
        cache: bool = False,
        push: str | None = None,
        progress: Progress = SILENT,
    ) -> Conversion:
        """Locate and describe a model, check that it can be converted, and plan it. Nothing is written.

        Args:
            model, target, out, max_shard_size, tp, ep, quantize, scheme, mtp, cache, progress: of
                :func:`convert_checkpoint`.
            push: Hub repo id that the output will be uploaded to.

        Raises:
            UsageError, SourceError, UnsupportedError: as :func:`convert_checkpoint`; an invalid repo id; a conversion
                by rank, which is not uploaded.
        """
        ranks = ranks_of(tp, ep)
        if push is not None:
            check_repo_id(push)
            if len(ranks) > 1:
                raise UsageError(
                    "Conversions by rank are not uploaded",
                    expected="--push without --tp and --ep",
                    found="both",
                    hint="engines load whole models: convert without --tp and --ep to upload",
                )
        row, size, layers = get_target(target), parse_size(max_shard_size), parse_mtp(mtp)
        source = locate(model, cache=cache, progress=progress)
        output = output_directory(source, f"{target}{ranks[0].suffix()}", out)
        description = _description(source, quantize, scheme, layers, progress)
        parts = []
        for rank in ranks:
            plan = make_plan(description, row, size, rank=rank, base_model=source.repo)
            parts.append(Part(plan, output if rank.is_whole else output / rank.folder()))
        layer = description.int8_layers[0]
        return cls(source, output, tuple(parts), layer.experts, layer.intermediate, push)

    @property
    def by_rank(self) -> bool:
        """Whether the experts are divided among ranks."""
        return not self.parts[0].plan.rank.is_whole

    @property
    def output_bytes(self) -> int:
        """Bytes that all plans write."""
        return sum(part.plan.output_bytes for part in self.parts)

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

        require_jobs(jobs)
        resumes = (self.by_rank or self.push is not None) and not overwrite
        finished = [_finished(part) if resumes else None for part in self.parts]
        if self.by_rank:
            from quarkconv.convert.ranks import prepare_folders, write_index

            prepare_folders(self.output, self.parts, finished, overwrite=overwrite)
        progress.step(f"Converting to {self.parts[0].plan.target}", self.output_bytes, "byte")
        manifests = []
        for part, manifest in zip(self.parts, finished, strict=True):
            if manifest is None:
                manifest = execute(
                    part.plan, self.source.files, part.folder, jobs=jobs, overwrite=overwrite, progress=progress
                )
            else:
                progress.advance(part.plan.output_bytes)
            manifests.append(manifest)
        if self.by_rank:
            write_index(self.output, self.parts, self.experts, self.intermediate)
        return self._result(*manifests)

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
        from quarkconv.write.shares import execute_share

        part = self._only_part()
        require_jobs(jobs)
        progress.step(f"Converting part {share} to {part.plan.target}", self.share_json(share)["part"]["bytes"], "byte")
        manifest = _finished(part)
        if manifest is None:
            try:
                manifest = execute_share(part.plan, self.source.files, self.output, share, jobs=jobs, progress=progress)
            except UsageError:  # another process may have finished the conversion meanwhile
                manifest = _finished(part)
                if manifest is None:
                    raise
        return None if manifest is None else self._result(manifest)

    def finish(self, *, jobs: int = DEFAULT_JOBS, progress: Progress = SILENT) -> ConversionResult:
        """Finish a conversion whose shares are all written, where the last :meth:`run_share` could not.

        Raises:
            UsageError: nothing was begun in the output directory.
            SourceError, UnsupportedError, InterruptedByUser: as :meth:`run`.
            WriteError: shares are missing, or writing failed.
        """
        from quarkconv.write.shares import finish_shares

        part = self._only_part()
        require_jobs(jobs)
        progress.step("Finishing", self.output_bytes, "byte")
        manifest = _finished(part)
        if manifest is None:
            manifest = finish_shares(part.plan, self.source.files, self.output, jobs=jobs, progress=progress)
        return self._result(manifest)

    def share_json(self, share: Share) -> dict[str, Any]:
        """A share as ``convert --part --json`` prints it."""
        shards = share.shards(self._only_part().plan.shards)
        nbytes = sum(shard.nbytes for shard in shards)
        return {"part": {"number": share.number, "count": share.count, "shards": len(shards), "bytes": nbytes}}

    def _only_part(self) -> Part:
        if self.by_rank:
            raise UsageError(
                "Conversions by rank are not divided into parts",
                expected="--part or --finish without --tp and --ep",
                found="both",
                hint="run one conversion by rank on each machine, or convert without --tp and --ep",
            )
        return self.parts[0]

    def _result(self, *manifests: Manifest) -> ConversionResult:
        return ConversionResult(self.source.origin, self.output, self.parts, manifests)

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
        return {"pushed": upload_folder(self.output, self.push, message, bars=bars)}

    @property
    def losses(self) -> tuple[Finding, ...]:
        """Settings and tensors of the source that the target does not keep."""
        return self.parts[0].plan.losses

    def to_json(self, share: Share | None = None, *, dry_run: bool = True) -> dict[str, Any]:
        """The object that ``convert --json`` prints while the conversion is not finished."""
        value = conversion_json(self.source.origin, self.output, self.parts, dry_run=dry_run)
        return value if share is None else value | self.share_json(share) | {"finished": False}


def require_jobs(jobs: int) -> None:
    """Raise :class:`UsageError` unless a number of threads is in range."""
    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError("`jobs` is out of range", expected=f"1 to {MAX_JOBS}", found=str(jobs))


def _finished(part: Part) -> Manifest | None:
    """The manifest that an earlier run of the same plan wrote; None when there is none, or the run did not finish.

    Raises:
        SourceError: there is a manifest that cannot be read.
    """
    from quarkconv.headers.unfinished import STAGING_NAME
    from quarkconv.plan.manifest import read_manifest
    from quarkconv.plan.plan import plan_digest

    manifest = None if (part.folder / STAGING_NAME).exists() else read_manifest(part.folder)
    return manifest if manifest is not None and manifest.plan == plan_digest(part.plan) else None
