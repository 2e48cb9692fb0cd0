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
from pathlib import Path
from typing import Any, Final

from quarkconv.convert.results import RankOutput
from quarkconv.errors import UsageError
from quarkconv.headers.checkpoint import MANIFEST_NAME
from quarkconv.headers.rank_index import RANKS_NAME
from quarkconv.headers.unfinished import STAGING_NAME
from quarkconv.plan.manifest import Manifest
from quarkconv.write.durable import write_durably, writing
from quarkconv.write.output_directory import create_directory
from quarkconv.write.space import allocated, records_nbytes, require_space

RANKS_FORMAT: Final = "quarkconv.ranks/1"
_FOLDER: Final = re.compile(r"rank-\d{2,}-of-\d{2,}")


def prepare_folders(
    output: Path, outputs: Sequence[RankOutput], finished: Sequence[Manifest | None], *, overwrite: bool
) -> None:
    """Create the directory of the ranks' folders, or check that it may be used.

    Args:
        output: the directory.
        outputs: those of all ranks.
        finished: the manifest of each output that is finished.
        overwrite: whether an earlier conversion by rank is deleted.

    Raises:
        UsageError: the directory holds something else.
        WriteError: there is not enough space for all ranks, or the directory cannot be created.
    """
    with writing(output):
        obsolete = _obsolete(output, outputs, overwrite=overwrite)
        _require_space(output, outputs, finished, obsolete)
        for path in obsolete:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()


def write_index(
    output: Path, outputs: Sequence[RankOutput], manifests: Sequence[Manifest], experts: int, intermediate: int
) -> None:
    """Write ``ranks.json``, durably.

    Args:
        output: the directory of the ranks' folders, all of which are finished.
        outputs: those of all ranks.
        manifests: theirs.
        experts, intermediate: E and I of the whole model.

    Raises:
        WriteError: writing failed.
    """
    with writing(output):
        index = _index(outputs, manifests, experts, intermediate)
        write_durably(output / RANKS_NAME, (json.dumps(index, indent=2) + "\n").encode())


def _obsolete(output: Path, outputs: Sequence[RankOutput], *, overwrite: bool) -> list[Path]:
    """The files and folders of an earlier conversion that are in the way and may be deleted."""
    create_directory(output)
    folders = {item.folder.name for item in outputs}
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


def _require_space(
    output: Path, outputs: Sequence[RankOutput], finished: Sequence[Manifest | None], obsolete: Sequence[Path]
) -> None:
    """Check the space for all ranks before the first is written, and before anything is deleted."""
    plans = [item.plan for item, manifest in zip(outputs, finished, strict=True) if manifest is None]
    needed = sum(plan.output_bytes + records_nbytes(plan.shards) for plan in plans)
    reclaimed = {path for folder in obsolete for path in folder.rglob("*")}
    reclaimed.update(output.glob(f"rank-*/{STAGING_NAME}/**/*"))
    require_space(output, needed, allocated(reclaimed))


def _is_rank(path: Path) -> bool:
    """True of a folder that an earlier conversion by rank wrote, finished or not."""
    written = (path / MANIFEST_NAME).is_file() or (path / STAGING_NAME).is_dir()
    return written and _FOLDER.fullmatch(path.name) is not None and not path.is_symlink()


def _index(
    outputs: Sequence[RankOutput], manifests: Sequence[Manifest], experts: int, intermediate: int
) -> dict[str, Any]:
    first = outputs[0].plan.rank
    return {
        "format": RANKS_FORMAT,
        "target": outputs[0].plan.target,
        "parallel": first.parallel,
        "world_size": first.world_size,
        "experts": experts,
        "intermediate_size": intermediate,
        "ranks": [
            {
                "rank": item.plan.rank.rank,
                "folder": item.folder.name,
                "experts": _ends(item.plan.rank.experts(experts)),
                "intermediate": _ends(item.plan.rank.intermediate(intermediate)),
                "plan": manifest.plan,
            }
            for item, manifest in zip(outputs, manifests, strict=True)
        ],
    }


def _ends(numbers: range) -> list[int]:
    return [numbers.start, numbers.stop]
