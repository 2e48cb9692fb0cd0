"""Conversion as functions: plan it, and carry it out."""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from decimal import Decimal
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quarkconv.convert.planner import make_plan
from quarkconv.description.description import describe
from quarkconv.errors import UsageError
from quarkconv.files.base import Files, Progress
from quarkconv.files.local import LocalFiles
from quarkconv.headers.checkpoint import INDEX_NAME, MANIFEST_NAME
from quarkconv.hub.locate import locate_model
from quarkconv.plan.pieces import Plan
from quarkconv.targets import get_target

if TYPE_CHECKING:
    from collections.abc import Callable

    from quarkconv.plan.manifest import Manifest

DEFAULT_SHARD_SIZE: Final = "5GB"
DEFAULT_JOBS: Final = 4
"""Threads of a conversion: they wait for the disk most of the time, so that two processors serve four of them."""
MAX_JOBS: Final = 64
_UNITS: Final = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
                 "KIB": 2**10, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}  # fmt: skip


def plan_conversion(
    model: str | Path | Files,
    target: str,
    *,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    base_model: str | None = None,
    reading: Progress | None = None,
) -> Plan:
    """Plan a conversion: pure data, no tensor data is read.

    Args:
        model: directory or Hub repo id.
        target: name of the target, such as ``fused-int8``.
        max_shard_size: largest size of a shard's data, in bytes or as ``5GB`` or ``512MiB``.
        base_model: repo id that the model card names as the source; by default ``model``, where it is one.
        reading: told how reading the headers gets on.

    Raises:
        UsageError: no such target, or a size that is none.
        SourceError: the source is damaged or inconsistent.
        UnsupportedError: the source is not INT8, or the target cannot represent it.
    """
    wanted, size = get_target(target), parse_size(max_shard_size)
    source = locate_model(model, reading=reading)
    return make_plan(describe(source, reading), wanted, size, base_model=base_model or repo_id(model, source))


@dataclass(frozen=True, slots=True)
class ConversionResult:
    """What :func:`convert_checkpoint` made.

    Attributes:
        source: directory of the source, or the repo id and commit of one that was read from the Hub.
        output: directory of the output.
        plan: what was done.
        manifest: what was written.
    """

    source: Path | str
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
    cache: bool = False,
    progress: Callable[[int], None] | None = None,
    reading: Progress | None = None,
) -> ConversionResult:
    """Convert a checkpoint. The source is never written to; memory does not grow with the model.

    Args:
        model: directory or Hub repo id. What is on the Hub is read by byte ranges and not kept, unless it is in the
            Hub's cache already.
        target: name of the target, such as ``fused-int8``.
        out: directory to make; by default ``<model>-<target>`` beside the model.
        max_shard_size: largest size of a shard's data, in bytes or as ``5GB`` or ``512MiB``.
        jobs: threads that read and write.
        overwrite: replace an earlier conversion in ``out``.
        cache: download a model on the Hub to the Hub's cache, and convert it from there.
        progress: called with the number of bytes written since its last call.
        reading: told how reading the headers gets on, and with ``cache`` the download, before anything is written.

    Raises:
        UsageError, SourceError, UnsupportedError: as :func:`plan_conversion`; and ``out`` is not empty.
        WriteError: writing failed; the same call resumes.
        InterruptedByUser: interrupted; the same call resumes.
    """
    wanted, size = get_target(target), parse_size(max_shard_size)
    source = locate_model(model, cache=cache, reading=reading)
    plan = make_plan(describe(source, reading), wanted, size, base_model=repo_id(model, source))
    return run_plan(plan, source, output_directory(source, model, target, out), jobs, overwrite, progress)


def repo_id(model: str | Path | Files, source: Path | Files) -> str | None:
    """The Hub repo id of a model; None of a local one."""
    local = not isinstance(model, str | Path) or place_of(source) == Path(model)
    return None if local else str(model).partition("@")[0]


def run_plan(
    plan: Plan,
    source: Path | Files,
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
    return ConversionResult(place_of(source), output, plan, manifest)


def finished_conversion(plan: Plan, source: Path | Files, output: Path) -> ConversionResult | None:
    """What an earlier run of the same plan wrote to ``output``; None when it is not there, or not finished.

    Raises:
        SourceError: there is a manifest that cannot be read.
    """
    from quarkconv.headers.unfinished import STAGING_NAME
    from quarkconv.plan.json import plan_digest
    from quarkconv.plan.manifest import read_manifest

    manifest = None if (output / STAGING_NAME).exists() else read_manifest(output)
    if manifest is None or manifest.plan != plan_digest(plan):
        return None
    return ConversionResult(place_of(source), output, plan, manifest)


def place_of(source: Path | Files) -> Path | str:
    """A directory, or the name under which a source on the Hub can be had again."""
    if isinstance(source, Path):
        return source
    return source.root if isinstance(source, LocalFiles) else str(source)


def output_directory(source: Path | Files, model: str | Path, target: str, out: str | Path | None) -> Path:
    """Where a conversion goes.

    Raises:
        UsageError: it would lie inside the source, or the source inside it.
    """
    place = place_of(source)
    if out is not None:
        output = Path(out)
    elif place == Path(model):
        named = place if place.name not in ("", "..") else place.resolve()
        if not named.name:
            raise UsageError("There is no directory beside this model for the output", file=str(place),
                             hint="give --out")  # fmt: skip
        output = named.with_name(f"{named.name}-{target}")
    else:  # a repo id: beside the working directory's other models, not inside the Hub's cache
        output = Path(f"{str(model).partition('@')[0].rpartition('/')[2]}-{target}")
    if isinstance(place, str):
        return output
    inner, outer = output.resolve(), place.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UsageError(
            "Source and output must not lie inside one another", file=str(output),
            expected=f"a directory outside of {place}", hint="give another --out",
        )  # fmt: skip
    return output


def plan_summary(plan: Plan, source: Path | Files | str, output: Path) -> dict[str, Any]:
    """What a plan will do, as ``convert --dry-run --json`` prints it."""
    return {
        "schema": "quarkconv.convert/1",
        "source": source if isinstance(source, str) else str(place_of(source)),
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
