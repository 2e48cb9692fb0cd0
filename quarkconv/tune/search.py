"""The fastest tile by few measurements: starts, then variations of the best, then the fastest again in turns.

One tile can be for several shapes: those for which an engine reads the same table. It is then the one that saves the
largest part of their times, in the geometric mean, among those that make none slower than the engine's choice.
"""

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

Times = tuple[float, ...]
"""Median microseconds of each shape."""

Time = Callable[[Tile, int], Times]
"""Tile and repetitions -> times."""

Timings = tuple[Timing, ...]
"""What was found, for each shape: all with the same tile."""

Found = tuple[list[Tile], Timings | None]
"""Tiles to compile next, and the fastest so far, if any was timed."""

Search = Generator[Found, Sequence[bool], Timings]
"""Yields tiles before it times them; is sent which of them the GPU can launch; returns the fastest."""

Key = TypeVar("Key", bound=Hashable)


def search(
    defaults: Sequence[Tile], starts: Iterable[Tile], vary: Callable[[Tile], Iterable[Tile]], time: Time
) -> Search:
    """The fastest tile, which is the default where nothing is faster.

    A GPU at its power limit is slower a moment later, so that the last measurements take turns with the default.

    Args:
        defaults: what the engine chooses without a table, for each shape; these can be launched.
        starts: tiles to begin with.
        vary: variations of a tile.
        time: measures a tile.
    """
    times: dict[Tile, Times] = {}

    def measure(tiles: Iterable[Tile], found: Timings | None) -> Generator[Found, Sequence[bool], Tile]:
        new = [tile for tile in dict.fromkeys(tiles) if tile not in times]
        works = yield new, found
        times.update({tile: time(tile, _QUICK) for tile, ok in zip(new, works, strict=True) if ok})
        return _by_gain(times, defaults)[0]

    best = yield from measure([*defaults, *starts], None)
    yield from measure(vary(best), _timings(best, times, defaults))
    finalists = dict.fromkeys([*_by_gain(times, defaults)[:_FINALISTS], *defaults])
    rounds = [{tile: time(tile, _THOROUGH) for tile in finalists} for _ in range(_ROUNDS)]
    medians = {
        tile: tuple(map(statistics.median, zip(*(each[tile] for each in rounds), strict=True))) for tile in finalists
    }
    return _timings(_by_gain(medians, defaults)[0], medians, defaults)


def _by_gain(times: Mapping[Tile, Times], defaults: Sequence[Tile]) -> list[Tile]:
    """Tiles by the product of their times over those of the engine's choices; last those that make a shape slower."""
    own = [times[tile][number] for number, tile in enumerate(defaults)]

    def rank(tile: Tile) -> tuple[bool, float]:
        ratios = [each / by_default for each, by_default in zip(times[tile], own, strict=True)]
        return max(ratios) > 1.0, math.prod(ratios)

    return sorted(times, key=rank)


def _timings(tile: Tile, times: Mapping[Tile, Times], defaults: Sequence[Tile]) -> Timings:
    return tuple(Timing(tile, times[own][number], times[tile][number]) for number, own in enumerate(defaults))


def run_together(
    searches: Mapping[Key, Search], launches: Callable[[Sequence[tuple[Key, Tile]]], Iterable[bool]]
) -> Iterator[tuple[Key, Timings]]:
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
