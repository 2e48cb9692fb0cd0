"""The commands as functions."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quarkconv.description import describe
from quarkconv.errors import UsageError
from quarkconv.findings import Finding
from quarkconv.headers.checkpoint import INDEX_NAME, MANIFEST_NAME
from quarkconv.hub import resolve_model
from quarkconv.inspection.inspection import Inspection, make_inspection
from quarkconv.plan.pieces import Plan
from quarkconv.plan.planner import make_plan
from quarkconv.targets import get_target

if TYPE_CHECKING:
    from collections.abc import Callable

    from quarkconv.manifest import Manifest

DEFAULT_SHARD_SIZE: Final = "5GB"
DEFAULT_JOBS: Final = 4
"""Threads of a conversion: they wait for the disk most of the time, so that two processors serve four of them."""
MAX_JOBS: Final = 64
_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
                 "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def inspect_checkpoint(model: str | Path, *, deep: bool = False) -> Inspection:
    """Tell what a checkpoint holds, from headers only.

    Args:
        model: directory or Hub repo id.
        deep: also read scales and zero points, never weights.

    Raises:
        SourceError: there is nothing that can be described.
    """
    description = describe(resolve_model(model))
    extra: tuple[Finding, ...] = ()
    if deep:
        from quarkconv.inspection.deep import deep_findings

        extra = tuple(deep_findings(description))
    return make_inspection(str(model), description, extra)


def plan_conversion(
    model: str | Path,
    target: str,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    base_model: str | None = None,
) -> Plan:
    """Plan a conversion: pure data, no tensor data is read.

    Args:
        model: directory or Hub repo id.
        target: name of the target, such as ``fused-int8``.
        max_shard_size: largest size of a shard's data, in bytes or as ``5GB`` or ``512MiB``.
        base_model: repo id that the model card names as the source; by default ``model``, where it is one.

    Raises:
        UsageError: no such target, or a size that is none.
        SourceError: the source is damaged or inconsistent.
        UnsupportedError: the source is not INT8, or the target cannot represent it.
    """
    wanted, size = get_target(target), parse_size(max_shard_size)
    source = resolve_model(model)
    return make_plan(describe(source), wanted, size, base_model=base_model or repo_id(model, source))


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """What :func:`convert_checkpoint` made.

    Attributes:
        source: directory of the source.
        output: directory of the output.
        plan: what was done.
        manifest: what was written.
    """

    source: Path
    output: Path
    plan: Plan
    manifest: Manifest

    def to_json(self) -> dict[str, Any]:
        """The object that ``convert --json`` prints."""
        return {**plan_summary(self.plan, self.source, self.output), "dry_run": False, "plan": self.manifest.plan}


def convert_checkpoint(
    model: str | Path,
    target: str,
    out: str | Path | None = None,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    jobs: int = DEFAULT_JOBS,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConversionResult:
    """Convert a checkpoint. The source is never written to; memory does not grow with the model.

    Args:
        model: directory or Hub repo id.
        target: name of the target, such as ``fused-int8``.
        out: directory to make; by default ``<model>-<target>`` beside the model.
        max_shard_size: largest size of a shard's data, in bytes or as ``5GB`` or ``512MiB``.
        jobs: threads that read and write.
        overwrite: replace an earlier conversion in ``out``.
        progress: called with the number of bytes written since its last call.

    Raises:
        UsageError, SourceError, UnsupportedError: as :func:`plan_conversion`; and ``out`` is not empty.
        WriteError: writing failed; the same call resumes.
        InterruptedByUser: interrupted; the same call resumes.
    """
    wanted, size = get_target(target), parse_size(max_shard_size)
    source = resolve_model(model)
    plan = make_plan(describe(source), wanted, size, base_model=repo_id(model, source))
    return run_plan(plan, source, output_directory(source, model, target, out), jobs, overwrite, progress)


def repo_id(model: str | Path, source: Path) -> str | None:
    """The Hub repo id of a model; None of a local one."""
    return None if source == Path(model) else str(model).partition("@")[0]


def run_plan(
    plan: Plan,
    source: Path,
    output: Path,
    jobs: int = DEFAULT_JOBS,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> ConversionResult:
    """Carry out a plan that was made of ``source``. See :func:`convert_checkpoint`."""
    from quarkconv.write.executor import execute

    if not 1 <= jobs <= MAX_JOBS:
        raise UsageError("This number of jobs makes no sense", expected=f"1 to {MAX_JOBS}", found=str(jobs))
    report = progress or (lambda _: None)
    manifest = execute(plan, source, output, jobs=jobs, overwrite=overwrite, progress=report)
    return ConversionResult(source, output, plan, manifest)


def output_directory(source: Path, model: str | Path, target: str, out: str | Path | None) -> Path:
    """Where a conversion goes.

    Raises:
        UsageError: it would lie inside the source, or the source inside it.
    """
    if out is not None:
        output = Path(out)
    elif source == Path(model):
        named = source if source.name not in ("", "..") else source.resolve()
        if not named.name:
            raise UsageError("There is no directory beside this model for the output", file=str(source),
                             hint="give --out")  # fmt: skip
        output = named.with_name(f"{named.name}-{target}")
    else:  # a repo id: beside the working directory's other models, not inside the Hub's cache
        output = Path(f"{str(model).partition('@')[0].rpartition('/')[2]}-{target}")
    inner, outer = output.resolve(), source.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UsageError(
            "Source and output must not lie inside one another", file=str(output),
            expected=f"a directory outside of {source}", hint="give another --out",
        )  # fmt: skip
    return output


def plan_summary(plan: Plan, source: Path, output: Path) -> dict[str, Any]:
    """What a plan will do, as ``convert --dry-run --json`` prints it."""
    return {
        "schema": "quarkconv.convert/1",
        "source": str(source),
        "output": str(output),
        "target": plan.target,
        "scheme": plan.scheme,
        "moe": {
            "layers": list(plan.moe.layers),
            "experts": plan.moe.experts,
            "hidden_size": plan.moe.hidden_size,
            "intermediate_size": plan.moe.intermediate_size,
        },
        "shards": len(plan.shards),
        "tensors": sum(len(shard.tensors) for shard in plan.shards),
        "pieces": sum(len(tensor.pieces) for shard in plan.shards for tensor in shard.tensors),
        "bytes": plan.output_bytes,
        "files": [shard.file for shard in plan.shards]
        + ["config.json", INDEX_NAME, MANIFEST_NAME]
        + [copy.name for copy in plan.copies]
        + [text.name for text in plan.texts],
        "findings": [asdict(loss) for loss in plan.losses],
    }


def parse_size(size: int | str) -> int:
    """A number of bytes from ``5GB``, ``512MiB`` or a plain number.

    Raises:
        UsageError: it is none of these.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([A-Za-z]*)", str(size).strip())
    if match is None or match[2].upper() not in _UNITS:
        raise UsageError("This is not a size", expected="a size such as 5GB, 512MiB or 1000000", found=repr(size))
    size_in_bytes = int(Decimal(match[1]) * _UNITS[match[2].upper()])
    if size_in_bytes >= 2**63:
        raise UsageError("This is more than any file can hold", expected="less than 2^63 bytes", found=repr(size)[:80])
    return size_in_bytes
