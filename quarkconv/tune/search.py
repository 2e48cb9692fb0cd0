"""The fastest tile by few measurements: starts, then variations of the best, then the fastest again in turns."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Final, TypeVar

from quarkconv.tune.grid import Tile
from quarkconv.tune.tables import Timing

_FINALISTS: Final = 3
_ROUNDS: Final = 3
_QUICK: Final = 4
_THOROUGH: Final = 10

Time = Callable[[Tile, int], float]
"""Tile and repetitions -> median microseconds."""

Found = tuple[list[Tile], Timing | None]
"""Tiles to compile next, and the fastest so far, if any was timed."""

Search = Generator[Found, Sequence[bool], Timing]
"""Yields tiles before it times them; is sent which of them the GPU can launch; returns the fastest."""

Key = TypeVar("Key", bound=Hashable)


def search(default: Tile, starts: Iterable[Tile], vary: Callable[[Tile], Iterable[Tile]], time: Time) -> Search:
    """The fastest tile, which is the default where nothing is faster.

    A GPU at its power limit is slower a moment later, so that the last measurements take turns with the default.

    Args:
        default: what the engine chooses without a table; it can be launched.
        starts: tiles to begin with.
        vary: variations of a tile.
        time: measures a tile.
    """
    times: dict[Tile, float] = {}

    def measure(tiles: Iterable[Tile], found: Timing | None) -> Generator[Found, Sequence[bool], Tile]:
        new = [tile for tile in dict.fromkeys(tiles) if tile not in times]
        works = yield new, found
        times.update({tile: time(tile, _QUICK) if ok else math.inf for tile, ok in zip(new, works, strict=True)})
        return min(times, key=lambda tile: times[tile])

    best = yield from measure([default, *starts], None)
    yield from measure(vary(best), Timing(best, times[default], times[best]))
    launched = [tile for tile in sorted(times, key=lambda tile: times[tile]) if times[tile] < math.inf]
    finalists = dict.fromkeys([*launched[:_FINALISTS], default])
    rounds = [{tile: time(tile, _THOROUGH) for tile in finalists} for _ in range(_ROUNDS)]
    medians = {tile: statistics.median(each[tile] for each in rounds) for tile in finalists}
    chosen = min(medians, key=lambda tile: medians[tile])
    return Timing(chosen, medians[default], medians[chosen])


def run_together(
    searches: Mapping[Key, Search], launches: Callable[[Sequence[tuple[Key, Tile]]], Iterable[bool]]
) -> Iterator[tuple[Key, Timing]]:
    """Run searches in step, so that what all of them time next is compiled at once.

    Yields each key twice: with the fastest of its starts, and with the fastest.

    Args:
        searches: by key.
        launches: compiles the tiles of searches, and says which of them the GPU can launch; only these are measured.
    """
    following = {key: next(each) for key, each in searches.items()}
    while following:
        pairs = [(key, tile) for key, (tiles, _) in following.items() for tile in tiles]
        works = dict(zip(pairs, launches(pairs), strict=True))
        current, following = following, {}
        for key, (tiles, _) in current.items():
            try:
                following[key] = searches[key].send([works[key, tile] for tile in tiles])
            except StopIteration as end:
                yield key, end.value
            else:
                found = following[key][1]
                if found is not None:
                    yield key, found
