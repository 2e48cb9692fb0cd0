"""The output of a conversion by rank: a folder for each rank, and an index of them.

    OUT/ranks.json         {"format": "quarkconv.ranks/1", "target": ..., "parallel": "tp", "world_size": 2,
                            "experts": E, "intermediate_size": I,
                            "ranks": [{"rank": 0, "folder": "rank-00-of-02", "experts": [first, end],
                                       "intermediate": [first, end], "plan": SHA-256 of the plan}, ...]}
    OUT/rank-00-of-02/     everything that rank 0 needs: a checkpoint with its own manifest
    OUT/rank-01-of-02/     ...

Only routed experts are divided. Each folder has every other tensor, because how an engine divides those depends on the
model. The index is written last: a directory that has one is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import UsageError
from quarkconv.headers.checkpoint import MANIFEST_NAME
from quarkconv.headers.rank_index import RANKS_NAME
from quarkconv.headers.unfinished import STAGING_NAME
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.plan import Plan
from quarkconv.write.checks import check_float_rows
from quarkconv.write.durable import write_durably, writing
from quarkconv.write.execution import Execution, open_source
from quarkconv.write.output_directory import create_directory
from quarkconv.write.space import allocated, records_nbytes, require_space
from quarkconv.write.whole import write_whole

RANKS_FORMAT: Final = "quarkconv.ranks/1"
_FOLDER: Final = re.compile(r"rank-\d{2,}-of-\d{2,}")


def write_ranks(
    folder: Path,
    executions: Sequence[Execution],
    *,
    overwrite: bool,
) -> list[Manifest]:
    """Carry out the plans of all ranks, one after the other, and index their folders. The same call resumes.

    Args:
        folder: the directory of the ranks' folders.
        executions: those of all ranks.
        overwrite: whether an earlier conversion by rank is deleted.

    Raises:
        UsageError: the directory holds something else.
        WriteError: there is not enough space for all ranks, or writing failed.
        SourceError, UnsupportedError, InterruptedByUser: as :func:`quarkconv.write.write.write_output`.
    """
    plans, progress = [execution.plan for execution in executions], executions[0].progress
    finished = [None if overwrite else execution.finished() for execution in executions]
    unfinished = [plan for plan, manifest in zip(plans, finished, strict=True) if manifest is None]
    if unfinished and plans[0].options.quantizes:  # before the first rank is written
        with closing(open_source(executions[0].source, plans[0])) as sources:
            check_float_rows(unfinished, sources, executions[0].jobs)
    _prepare(folder, executions, finished, overwrite=overwrite)
    progress.step(f"Converting to {plans[0].target}", sum(plan.output_bytes for plan in plans), "byte")
    manifests = []
    for execution, manifest in zip(executions, finished, strict=True):
        if manifest is not None:
            progress.advance(execution.plan.output_bytes)
        manifests.append(manifest or write_whole(execution, overwrite=overwrite))
    with writing(folder):
        index = _index(plans, manifests)
        write_durably(folder / RANKS_NAME, (json.dumps(index, indent=2) + "\n").encode())
    return manifests


def _prepare(
    output: Path, executions: Sequence[Execution], finished: Sequence[Manifest | None], *, overwrite: bool
) -> None:
    """Create the directory of the ranks' folders, or check that it may be used."""
    plans = [execution.plan for execution in executions]
    with writing(output):
        obsolete = _obsolete(output, plans, overwrite=overwrite)
        _require_space(output, [plan for plan, manifest in zip(plans, finished, strict=True) if not manifest], obsolete)
        for path in obsolete:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def _obsolete(output: Path, plans: Sequence[Plan], *, overwrite: bool) -> list[Path]:
    """The files and folders of an earlier conversion that are in the way and may be deleted."""
    create_directory(output)
    folders = {plan.rank.folder() for plan in plans}
    present = sorted(output.iterdir())
    obsolete = [path for path in present if path.name == RANKS_NAME or _is_rank(path)] if overwrite else []
    for path in present:
        if path not in obsolete and path.name not in folders:
            raise UsageError(
                "The output directory holds something else",
                file=str(output),
                expected="a new or empty directory",
                found=path.name,
                hint="give another --out, or --overwrite to replace an earlier conversion by rank",
            )
    return obsolete


def _require_space(output: Path, plans: Sequence[Plan], obsolete: Sequence[Path]) -> None:
    """Check the space for all ranks before the first is written, and before anything is deleted."""
    needed = sum(plan.output_bytes + records_nbytes(plan.shards) for plan in plans)
    reclaimed = {path for folder in obsolete for path in folder.rglob("*")}
    reclaimed.update(output.glob(f"rank-*/{STAGING_NAME}/**/*"))
    require_space(output, needed, allocated(reclaimed))


def _is_rank(path: Path) -> bool:
    """True of a folder that an earlier conversion by rank wrote, finished or not."""
    written = (path / MANIFEST_NAME).is_file() or (path / STAGING_NAME).is_dir()
    return written and _FOLDER.fullmatch(path.name) is not None and not path.is_symlink()


def _index(plans: Sequence[Plan], manifests: Sequence[Manifest]) -> dict[str, Any]:
    first, parts = plans[0].rank, [plan.moe for plan in plans if plan.moe is not None]
    experts, intermediate = parts[0].experts, parts[0].intermediate_size  # of the whole model, of which one is divided
    if first.parallel == "ep":
        experts = sum(part.experts for part in parts)
    else:
        intermediate = sum(part.intermediate_size for part in parts)
    return {
        "format": RANKS_FORMAT,
        "target": plans[0].target,
        "parallel": first.parallel,
        "world_size": first.world_size,
        "experts": experts,
        "intermediate_size": intermediate,
        "ranks": [
            {
                "rank": plan.rank.rank,
                "folder": plan.rank.folder(),
                "experts": _ends(plan.rank.experts(experts)),
                "intermediate": _ends(plan.rank.intermediate(intermediate)),
                "plan": manifest.plan,
            }
            for plan, manifest in zip(plans, manifests, strict=True)
        ],
    }


def _ends(numbers: range) -> list[int]:
    return [numbers.start, numbers.stop]
