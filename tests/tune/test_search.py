"""The search finds the fastest tile by few measurements; what cannot be launched is never measured."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace

from quarkconv.tune.grid import Tile, starts, variations
from quarkconv.tune.search import run_together, search
from quarkconv.tune.shapes import whole
from quarkconv.tune.tables import Timing

SHAPE, TOKENS, SHARED = whole(128, 8, 2048, 768), 2048, 227 * 1024
DEFAULT = Tile(128, 128, 64, 1, 8, 3)
BEST = Tile(64, 128, 128, 16, 4, 4)


def cost(tile: Tile) -> float:
    """Microseconds that grow with the distance from the best tile, in steps of two."""
    pairs = zip(
        (tile.block_m, tile.block_n, tile.block_k, tile.group_m, tile.num_warps, tile.num_stages),
        (BEST.block_m, BEST.block_n, BEST.block_k, BEST.group_m, BEST.num_warps, BEST.num_stages),
        strict=True,
    )
    return 100.0 + 10 * sum(max(a / b, b / a) - 1 for a, b in pairs)


def run(
    time: Callable[[Tile], float], launches: Callable[[Tile], bool] = lambda _: True
) -> tuple[Timing, Counter[Tile]]:
    """What one search finds, and how often it measured each tile."""
    measured: Counter[Tile] = Counter()

    def timed(tile: Tile, repeats: int) -> tuple[float]:
        measured[tile] += repeats
        return (time(tile),)

    def each(wanted: Sequence[tuple[int, Tile]]) -> list[bool]:
        return [launches(tile) for _, tile in wanted]

    first = starts(SHAPE, TOKENS, SHARED)
    one = search([DEFAULT], first, lambda tile: variations(tile, SHAPE, TOKENS, SHARED), timed)
    *_, (_, [found]) = run_together({TOKENS: one}, each)
    return found, measured


def test_the_fastest_tile_is_found_by_few_measurements() -> None:
    found, measured = run(cost)
    assert found == Timing(BEST, cost(DEFAULT), 100.0)
    assert len(measured) <= 1 + 22 + 8
    assert measured[BEST] == measured[DEFAULT] == 4 + 3 * 10  # once, then thrice in turns


def test_the_default_stays_where_nothing_is_faster() -> None:
    found, _ = run(lambda tile: 50.0 if tile == DEFAULT else cost(tile))
    assert found == Timing(DEFAULT, 50.0, 50.0)


def test_what_cannot_be_launched_is_never_measured() -> None:
    found, measured = run(cost, lambda tile: tile.num_stages != 4)
    assert {tile.num_stages for tile in measured} == {3, 5}
    assert found.tile.num_stages != 4
    assert found.tuned_us == cost(found.tile)


def test_a_lucky_first_measurement_does_not_win() -> None:
    """A tile that was fast once, and then is slower than the best."""
    lucky, calls = replace(BEST, group_m=1), Counter[Tile]()

    def time(tile: Tile) -> float:
        calls[tile] += 1
        return 1.0 if tile == lucky and calls[tile] == 1 else cost(tile)

    assert run(time)[0].tile == BEST


def test_searches_in_step_compile_together_and_show_what_they_have() -> None:
    """Each asks twice, for its starts and for variations; what each found so far is known before the second."""
    compiled: list[list[tuple[int, Tile]]] = []

    def launches(wanted: Sequence[tuple[int, Tile]]) -> list[bool]:
        compiled.append(list(wanted))
        return [True] * len(wanted)

    def time(tile: Tile, _: int) -> tuple[float]:
        return (cost(tile),)

    searches = {
        tokens: search(
            [DEFAULT],
            starts(SHAPE, tokens, SHARED),
            lambda tile, tokens=tokens: variations(tile, SHAPE, tokens, SHARED),  # type: ignore[misc]
            time,
        )
        for tokens in (64, TOKENS)
    }
    found = list(run_together(searches, launches))
    assert [tokens for tokens, _ in found] == [64, TOKENS, 64, TOKENS]
    assert [{tokens for tokens, _ in wanted} for wanted in compiled] == [{64, TOKENS}] * 2
    assert {tile for tokens, tile in compiled[0] if tokens == TOKENS} == {DEFAULT, *starts(SHAPE, TOKENS, SHARED)}
    assert not set(compiled[0]) & set(compiled[1])
    for tokens in (64, TOKENS):
        early, last = (timing for each, [timing] in found if each == tokens)
        assert early.default_us == last.default_us == cost(DEFAULT)
        assert last.tuned_us <= early.tuned_us < early.default_us


def run_for_two(costs: dict[Tile, tuple[float, float]], defaults: Sequence[Tile]) -> tuple[Timing, ...]:
    """What a search for two shapes finds among the tiles of `costs`."""
    one = search(defaults, list(costs), lambda _: [], lambda tile, _: costs[tile])
    *_, (_, found) = run_together({0: one}, lambda pairs: [True] * len(pairs))
    return found


def test_a_tile_for_two_shapes_saves_most_of_both() -> None:
    first, second = replace(BEST, num_warps=8), replace(BEST, group_m=1)
    costs = {DEFAULT: (100.0, 400.0), first: (50.0, 390.0), second: (80.0, 200.0)}
    assert run_for_two(costs, [DEFAULT, DEFAULT]) == (Timing(second, 100.0, 80.0), Timing(second, 400.0, 200.0))


def test_a_tile_for_two_shapes_makes_neither_slower() -> None:
    lopsided = replace(BEST, num_warps=8)
    costs = {DEFAULT: (100.0, 400.0), lopsided: (20.0, 401.0), BEST: (95.0, 400.0)}
    assert run_for_two(costs, [DEFAULT, DEFAULT]) == (Timing(BEST, 100.0, 95.0), Timing(BEST, 400.0, 400.0))


def test_each_shape_is_compared_with_the_engines_choice_for_it() -> None:
    other = replace(DEFAULT, block_m=64)
    costs = {DEFAULT: (100.0, 90.0), other: (70.0, 80.0), BEST: (60.0, 79.0)}
    assert run_for_two(costs, [DEFAULT, other]) == (Timing(BEST, 100.0, 60.0), Timing(BEST, 80.0, 79.0))
