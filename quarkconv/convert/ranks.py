"""Conversions that are divided among ranks: a folder for each rank, and an index of them.

    OUT/ranks.json         {"format": "quarkconv.ranks/1", "target": ..., "parallel": "tp", "world_size": 2,
                            "experts": E, "intermediate_size": I,
                            "ranks": [{"rank": 0, "folder": "rank-00-of-02", "experts": [first, end],
                                       "intermediate": [first, end], "plan": SHA-256 of the plan}, ...]}
    OUT/rank-00-of-02/     everything that rank 0 needs: a checkpoint with a manifest of its own
    OUT/rank-01-of-02/     ...

Only routed experts are divided; every other tensor is in each folder, since how engines divide those is a matter of the
model. The index comes last: a directory that has one is complete.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quarkconv.convert.conversion import (
    DEFAULT_JOBS,
    DEFAULT_SHARD_SIZE,
    ConversionResult,
    finished_conversion,
    output_directory,
    parse_size,
    place_of,
    plan_summary,
    repo_id,
    run_plan,
)
from quarkconv.convert.planner import make_plan
from quarkconv.description.description import describe
from quarkconv.errors import UsageError
from quarkconv.experts.ranks import Rank, make_rank
from quarkconv.files.base import Files, Progress
from quarkconv.headers.checkpoint import MANIFEST_NAME
from quarkconv.headers.rank_index import RANKS_NAME
from quarkconv.headers.unfinished import STAGING_NAME
from quarkconv.hub.locate import locate_model
from quarkconv.plan.json import plan_digest
from quarkconv.plan.pieces import Plan
from quarkconv.targets import get_target
from quarkconv.write.durable import write_durably, writing
from quarkconv.write.space import allocated, records_nbytes, require_space

RANKS_FORMAT: Final = "quarkconv.ranks/1"
_FOLDER: Final = re.compile(r"rank-\d{2,}-of-\d{2,}")


@dataclass(frozen=True, slots=True)
class RankConversion:
    """What a conversion by rank will make, or made.

    Attributes:
        source: directory of the source, or its files on the Hub.
        output: directory that holds the ranks' folders.
        plans: the plan of each rank, in order.
        experts, intermediate: E and I of the whole model.
    """

    source: Path | Files
    output: Path
    plans: tuple[Plan, ...]
    experts: int
    intermediate: int

    @property
    def ranks(self) -> list[Rank]:
        """The ranks, in order."""
        return [plan.rank for plan in self.plans]

    @property
    def output_bytes(self) -> int:
        """Bytes that all plans write."""
        return sum(plan.output_bytes for plan in self.plans)

    def to_json(self, *, dry_run: bool) -> dict[str, Any]:
        """The object that ``convert --tp`` and ``--ep`` print with ``--json``."""
        parts = [
            plan_summary(plan, place_of(self.source), self.output / rank.folder())
            for plan, rank in zip(self.plans, self.ranks, strict=True)
        ]
        return {
            "schema": "quarkconv.convert/1",
            "source": str(place_of(self.source)),
            "output": str(self.output),
            "target": self.plans[0].target,
            "scheme": self.plans[0].scheme,
            "bytes": self.output_bytes,
            "findings": parts[0]["findings"],
            "ranks": [{**rank.to_json(), **part} for rank, part in zip(self.ranks, parts, strict=True)],
            "dry_run": dry_run,
        }


def plan_by_rank(
    model: str | Path,
    target: str,
    out: str | Path | None = None,
    *,
    parallel: str,
    world_size: int,
    max_shard_size: int | str = DEFAULT_SHARD_SIZE,
    cache: bool = False,
    reading: Progress | None = None,
) -> RankConversion:
    """Plan the conversion of a checkpoint whose experts are divided among ranks.

    Args:
        model: directory or Hub repo id.
        target: name of the target; ``fused-int8``.
        out: directory to make; by default ``<model>-<target>-tp<N>`` or ``-ep<N>`` beside the model.
        parallel: ``tp`` for tensor parallel, ``ep`` for expert parallel.
        world_size: number of ranks.
        max_shard_size: largest size of a shard's data, in bytes or as ``5GB`` or ``512MiB``.
        cache: download a model on the Hub to the Hub's cache, and convert it from there.
        reading: told how reading the headers gets on, and the download.

    Raises:
        UsageError: no such target or number of ranks, or the target is not written by rank.
        SourceError: the source is damaged or inconsistent.
        UnsupportedError: the source is not INT8, or its experts cannot be divided so.
    """
    ranks = [make_rank(parallel, number, world_size) for number in range(world_size)]
    wanted, size = get_target(target), parse_size(max_shard_size)
    source = locate_model(model, cache=cache, reading=reading)
    description = describe(source, reading)
    output = output_directory(source, model, f"{target}-{parallel}{world_size}", out)
    base_model = repo_id(model, source)
    plans = tuple(make_plan(description, wanted, size, rank=rank, base_model=base_model) for rank in ranks)
    layer = description.int8_layers[0]
    return RankConversion(source, output, plans, layer.experts, layer.intermediate)


def convert_by_rank(
    conversion: RankConversion,
    *,
    jobs: int = DEFAULT_JOBS,
    overwrite: bool = False,
    progress: Callable[[int], None] | None = None,
) -> list[ConversionResult]:
    """Carry out the plans of all ranks, one after the other, and write the index.

    Ranks that an earlier call finished are kept, so that the same call resumes.

    Raises:
        UsageError: the output directory holds something else.
        SourceError, UnsupportedError, WriteError, InterruptedByUser: as :func:`quarkconv.convert_checkpoint`.
    """
    output, source = conversion.output, conversion.source
    with writing(output):
        earlier = _earlier(conversion, overwrite=overwrite)
        finished = _finished(conversion, overwrite=overwrite)
        _require_space(conversion, finished, earlier)
        for path in earlier:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink()
    results = []
    for plan, rank, done in zip(conversion.plans, conversion.ranks, finished, strict=True):
        if done is None:
            done = run_plan(plan, source, output / rank.folder(), jobs, overwrite, progress)
        elif progress is not None:
            progress(plan.output_bytes)
        results.append(done)
    with writing(output):
        write_durably(output / RANKS_NAME, (json.dumps(_index(conversion), indent=2) + "\n").encode())
    return results


def _earlier(conversion: RankConversion, *, overwrite: bool) -> list[Path]:
    """Make the output directory, or see that it may be used; what is in the way and may be deleted."""
    output = conversion.output
    if output.exists() and not output.is_dir():
        raise UsageError("The output is a file", file=str(output), expected="a new or empty directory")
    output.mkdir(parents=True, exist_ok=True)
    ours = {rank.folder() for rank in conversion.ranks}
    found = sorted(output.iterdir())
    earlier = [path for path in found if path.name == RANKS_NAME or _is_rank(path)] if overwrite else []
    for path in found:
        if path not in earlier and path.name not in ours:
            raise UsageError(
                "The output directory holds something else", file=str(output), expected="a new or empty directory",
                found=path.name, hint="give another --out, or --overwrite to replace an earlier conversion by rank",
            )  # fmt: skip
    return earlier


def _finished(conversion: RankConversion, *, overwrite: bool) -> list[ConversionResult | None]:
    """What an earlier call of the same plans finished, rank by rank."""
    return [
        None if overwrite else finished_conversion(plan, conversion.source, conversion.output / rank.folder())
        for plan, rank in zip(conversion.plans, conversion.ranks, strict=True)
    ]


def _require_space(conversion: RankConversion, finished: list[ConversionResult | None], earlier: list[Path]) -> None:
    """Ask for the space of all ranks before the first of them, and before anything is deleted."""
    output = conversion.output
    todo = [plan for plan, done in zip(conversion.plans, finished, strict=True) if done is None]
    needed = sum(plan.output_bytes + records_nbytes(plan.shards) for plan in todo)
    freed = {path for folder in earlier for path in folder.rglob("*")}
    freed.update(output.glob(f"rank-*/{STAGING_NAME}/**/*"))
    require_space(output, needed, allocated(freed))


def _is_rank(path: Path) -> bool:
    """True of a folder that an earlier conversion by rank made, finished or not."""
    made = (path / MANIFEST_NAME).is_file() or (path / STAGING_NAME).is_dir()
    return made and _FOLDER.fullmatch(path.name) is not None and not path.is_symlink()


def _index(conversion: RankConversion) -> dict[str, Any]:
    experts, intermediate = conversion.experts, conversion.intermediate
    first = conversion.ranks[0]
    return {
        "format": RANKS_FORMAT,
        "target": conversion.plans[0].target,
        "parallel": first.parallel,
        "world_size": first.world_size,
        "experts": experts,
        "intermediate_size": intermediate,
        "ranks": [
            {
                "rank": rank.rank,
                "folder": rank.folder(),
                "experts": _ends(rank.experts(experts)),
                "intermediate": _ends(rank.intermediate(intermediate)),
                "plan": plan_digest(plan),
            }
            for rank, plan in zip(conversion.ranks, conversion.plans, strict=True)
        ],
    }


def _ends(part: range) -> list[int]:
    return [part.start, part.stop]
