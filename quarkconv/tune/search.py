"""The fastest tile by few measurements: starts, then variations of the best, then the fastest again in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from typing import Final

from quarkconv.tune.grid import Tile
from quarkconv.tune.tables import Timing

_FINALISTS: Final = 3
_ROUNDS: Final = 3
_QUICK: Final = 4
_THOROUGH: Final = 10

Time = Callable[[Tile, int], float]
"""Tile and repetitions -> median microseconds."""


def fastest(
    default: Tile,
    starts: Iterable[Tile],
    vary: Callable[[Tile], Iterable[Tile]],
    time: Time,
    launches: Callable[[Sequence[Tile]], Iterable[bool]],
) -> Timing:
    """The fastest tile, which is the default where nothing is faster.

    A GPU at its power limit is slower a moment later, so that the last measurements take turns with the default.

    Args:
        default: what the engine chooses without a table; it can be launched.
        starts: tiles to begin with.
        vary: variations of a tile.
        time: measures a tile.
        launches: which tiles the GPU can launch; only these are measured.
    """
    times: dict[Tile, float] = {}

    def best_with(tiles: Iterable[Tile]) -> Tile:
        new = [tile for tile in dict.fromkeys(tiles) if tile not in times]
        works = list(launches(new))  # all are compiled before any is timed
        times.update({tile: time(tile, _QUICK) if ok else math.inf for tile, ok in zip(new, works, strict=True)})
        return min(times, key=lambda tile: times[tile])

    best_with(vary(best_with([default, *starts])))
    launched = [tile for tile in sorted(times, key=lambda tile: times[tile]) if times[tile] < math.inf]
    finalists = dict.fromkeys([*launched[:_FINALISTS], default])
    rounds = [{tile: time(tile, _THOROUGH) for tile in finalists} for _ in range(_ROUNDS)]
    medians = {tile: statistics.median(each[tile] for each in rounds) for tile in finalists}
    chosen = min(medians, key=lambda tile: medians[tile])
    return Timing(chosen, medians[default], medians[chosen])
