"""The output of a conversion by rank: a folder for each rank, and an index of them, in a directory or an object store.

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
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final, Protocol

from quarkconv.plan.manifest import Manifest
from quarkconv.plan.plan import Plan
from quarkconv.write.checks import check_float_rows
from quarkconv.write.execution import Execution, open_source
from quarkconv.write.rank_folders import RankFolders
from quarkconv.write.whole import write_whole

RANKS_FORMAT: Final = "quarkconv.ranks/1"


class RanksOutput(Protocol):
    """Where the folders of ranks lie."""

    def prepare(self, plans: Sequence[Plan], unfinished: Sequence[Plan], *, overwrite: bool) -> None:
        """Check that the folders of some ranks may be written, before the first of them is.

        Args:
            plans: those of all ranks.
            unfinished: those of the ranks that are not finished.
            overwrite: whether an earlier conversion by rank is deleted.

        Raises:
            UsageError: there is something else.
            WriteError: there is not enough space for all ranks, or another process works on one that is to be deleted.
        """

    def write_index(self, data: bytes) -> None:
        """Write the index."""


def write_ranks(location: Path | str, executions: Sequence[Execution], *, overwrite: bool) -> list[Manifest]:
    """Carry out the plans of all ranks, one after the other, and index their folders. The same call resumes.

    Args:
        location: the directory of the ranks' folders, or its URL.
        executions: those of all ranks.
        overwrite: whether an earlier conversion by rank is deleted.

    Raises:
        UsageError: the output holds something else.
        WriteError: there is not enough space for all ranks, or writing failed.
        SourceError, UnsupportedError, InterruptedByUser: as :func:`quarkconv.write.write.write_output`.
    """
    plans, progress, output = [execution.plan for execution in executions], executions[0].progress, _output_at(location)
    finished = [None if overwrite else execution.finished() for execution in executions]
    unfinished = [plan for plan, manifest in zip(plans, finished, strict=True) if manifest is None]
    if unfinished and plans[0].options.quantizes:  # before the first rank is written
        with closing(open_source(executions[0].source, plans[0])) as sources:
            check_float_rows(unfinished, sources, executions[0].jobs)
    output.prepare(plans, unfinished, overwrite=overwrite)
    progress.step(f"Converting to {plans[0].target}", sum(plan.output_bytes for plan in plans), "byte")
    manifests = []
    for execution, manifest in zip(executions, finished, strict=True):
        if manifest is not None:
            progress.advance(execution.plan.output_bytes)
        manifests.append(manifest or write_whole(execution, overwrite=overwrite))
    output.write_index((json.dumps(_index(plans, manifests), indent=2) + "\n").encode())
    return manifests


def _output_at(location: Path | str) -> RanksOutput:
    if isinstance(location, Path):
        return RankFolders(location)
    from quarkconv.write.rank_objects import RankObjects

    return RankObjects(location)


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
