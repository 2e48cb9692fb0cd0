"""Planning and converting a checkpoint in one call, from Python."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from quarkconv.convert.conversion import Conversion
from quarkconv.convert.jobs import DEFAULT_JOBS
from quarkconv.convert.options import Options
from quarkconv.convert.planner import plans_of
from quarkconv.convert.results import ConversionResult
from quarkconv.convert.shard_size import DEFAULT_SHARD_SIZE
from quarkconv.hub.locate import locate
from quarkconv.plan.plan import Plan
from quarkconv.progress import SILENT, Progress
from quarkconv.scheme.options import KEEP, Quantize
from quarkconv.targets import get_target
from quarkconv.write.modes import Whole


def plan_conversion(
    model: str | Path,
    target: str,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    tp: int = 1,
    ep: int = 1,
    rank: int = 0,
    quantize: Quantize | None = None,
    exclude: Iterable[str] = (),
    scheme: str | None = None,
    mtp: str = KEEP,
    progress: Progress = SILENT,
) -> Plan:
    """Plan a conversion: pure data, no tensor data is read.

    Args:
        model: directory or Hub repo id.
        target: name of the target, such as ``fused-int8``.
        max_shard_size, tp, ep, quantize, exclude, scheme, mtp: see :class:`quarkconv.convert.options.Options`.
        rank: the rank whose part is planned.
        progress: receives how far reading the headers has come.

    Raises:
        UsageError: no such target or rank, or an invalid size.
        SourceError: the source is damaged or inconsistent.
        UnsupportedError: the source is not INT8, or the target cannot represent it.
    """
    options = Options(
        max_shard_size=max_shard_size, tp=tp, ep=ep, quantize=quantize, exclude=exclude, scheme=scheme, mtp=mtp
    )
    chosen, row = options.rank(rank), get_target(target)
    source = locate(model, progress=progress)
    (plan,) = plans_of(source, row, options, [chosen], progress)
    return plan


def convert_checkpoint(
    model: str | Path,
    target: str,
    out: str | Path | None = None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    tp: int = 1,
    ep: int = 1,
    quantize: Quantize | None = None,
    exclude: Iterable[str] = (),
    scheme: str | None = None,
    mtp: str = KEEP,
    jobs: int = DEFAULT_JOBS,
    overwrite: bool = False,
    cache: bool = False,
    progress: Progress = SILENT,
) -> ConversionResult:
    """Convert a checkpoint. The source is only read; memory does not grow with the model.

    Args:
        model: directory, Hub repo id, or URL in an object store. A remote model is read by byte ranges and not stored,
            unless the Hub's cache holds it already.
        target: name of the target, such as ``fused-int8``.
        out: directory to create, or URL in an object store; by default ``<model>-<target>`` beside the model.
        max_shard_size, tp, ep, quantize, exclude, scheme, mtp: see :class:`quarkconv.convert.options.Options`. With
            more than one rank, ``out`` has a folder for each.
        jobs: threads that read and write.
        overwrite: replace an earlier conversion in ``out``.
        cache: download a model to the Hub's cache, and convert it from there.
        progress: receives how far the download, reading the headers and writing have come.

    Raises:
        UsageError, SourceError, UnsupportedError: as :func:`plan_conversion`; and ``out`` holds something else.
        WriteError: writing failed; the same call resumes.
        InterruptedByUser: interrupted; the same call resumes.
    """
    options = Options(
        max_shard_size=max_shard_size, tp=tp, ep=ep, quantize=quantize, exclude=exclude, scheme=scheme, mtp=mtp
    )
    conversion = Conversion.prepare(model, target, out, options, cache=cache, progress=progress)
    return conversion.carry_out(Whole(overwrite), jobs=jobs, progress=progress).finished()
