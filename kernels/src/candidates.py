"""Launch options worth timing for a size: whole options to start from, and tiles to try in their place.

The tiles are those that won somewhere on an H200 or an H100, widened by what slices of large models need: column tiles
narrow enough that all SMs have work (192 columns of gate-up, say), and steps that divide a short summed dimension.
"""

from collections.abc import Iterator
from dataclasses import replace

from .options import (
    even_depth,
    fits_registers,
    gemv_options,
    heuristic_options,
    mean_rows_of,
    portable_tiles,
    specialized_tiles,
)
from .tables import GemvOptions, LaunchOptions, Options, RowBlocks, Shape, TileOptions, VectorTile

_MOST_GEMV_PAIRS = 320
_FEW_ROWS = 20
_MANY_ROWS = 40


def starts(tokens: int, shape: Shape) -> list[Options]:
    """Options to start from: the heuristic's, one for each cut of rows that suits these tokens, and GEMVs."""
    experts, top_k, hidden, intermediate = shape
    mean_rows = mean_rows_of(tokens, experts, top_k)
    found: list[Options] = [heuristic_options(tokens, shape, specialized=each) for each in (True, False)]
    first = found[0]
    assert isinstance(first, LaunchOptions)
    found += [replace(first, blocks=blocks) for blocks in _row_blocks(mean_rows)]
    if mean_rows > _MANY_ROWS:
        found += [LaunchOptions(RowBlocks(128, 32, 64), *tiles) for tiles in _mixed_tiles()]
    if tokens * top_k <= _MOST_GEMV_PAIRS:
        gemv = gemv_options(top_k, hidden, intermediate)
        found += [] if gemv is None else [gemv]
    return list(dict.fromkeys(found))


def variations(options: Options, tokens: int, shape: Shape) -> tuple[list[Options], list[Options]]:
    """(options with other gate-up tiles, options with other down tiles)."""
    experts, top_k, hidden, intermediate = shape
    if isinstance(options, GemvOptions):
        pairings = ([replace(options, gate_up=t) for t in _vectors()], [replace(options, down=t) for t in _vectors()])
        gate_ups, downs = (
            [each for each in side if fits_registers(each, top_k, hidden, intermediate)] for side in pairings
        )
        return list(gate_ups), list(downs)
    mean_rows = mean_rows_of(tokens, experts, top_k)
    return (
        [replace(options, gate_up=tile) for tile in _gate_up_tiles(mean_rows, hidden)],
        [replace(options, down=tile) for tile in _down_tiles(mean_rows, intermediate)],
    )


def _vectors() -> list[VectorTile]:
    sizes = ((1, 1), (2, 1), (4, 1), (8, 1), (1, 2), (2, 2), (4, 2), (8, 2), (4, 4), (8, 4), (16, 4))
    return [VectorTile(block_n, warps) for block_n, warps in sizes]


def _row_blocks(mean_rows: float) -> Iterator[RowBlocks]:
    if mean_rows <= _FEW_ROWS:
        yield RowBlocks(16)
    if 6 < mean_rows <= 80:
        yield from (RowBlocks(32, 0, 16), RowBlocks(32, 16, 16), RowBlocks(64, 16, 32), RowBlocks(64, 32, 32))
    if mean_rows > _MANY_ROWS:
        yield from (RowBlocks(128, 32, 64), RowBlocks(128, 32))


def _mixed_tiles() -> Iterator[tuple[TileOptions, TileOptions]]:
    """Tiles of gate-up and down of which at least one has specialized warps."""
    plain, (ping_pong, cooperative) = portable_tiles(8), specialized_tiles(4)
    yield from ((plain[0], ping_pong[1]), ping_pong, cooperative, (cooperative[0], ping_pong[1]))


def _gate_up_tiles(mean_rows: float, depth: int) -> Iterator[TileOptions]:
    if mean_rows <= _FEW_ROWS:
        for block_n, block_k, stages in ((64, 256, 3), (64, 128, 5), (64, 512, 3), (128, 256, 3)):
            yield TileOptions(block_n, even_depth(depth, block_k), 1, 4, stages)
        yield TileOptions(64, even_depth(depth, 256), 1, 4, 3, descriptors=False)
    if 6 < mean_rows <= 80:
        for group in (4, 1):
            yield TileOptions(64, even_depth(depth, 128), group, 4, 3)
        yield specialized_tiles(1)[0][0]
    if mean_rows > _MANY_ROWS:
        for group in (1, 4, 8):
            yield portable_tiles(group)[0]
        yield from (specialized_tiles(1)[0][0], specialized_tiles(4)[0][0], specialized_tiles(4)[1][0])


def _down_tiles(mean_rows: float, depth: int) -> Iterator[TileOptions]:
    if mean_rows <= 80:
        sizes = ((256, 64, 3), (128, 64, 4), (128, 128, 4), (256, 128, 3), (64, 256, 3), (64, 128, 5))
        for block_n, block_k, stages in sizes:
            yield TileOptions(block_n, even_depth(depth, block_k), 1, 4, stages)
        yield TileOptions(64, even_depth(depth, 256), 1, 2, 3)
    if mean_rows > 6:
        yield from (specialized_tiles(group)[0][1] for group in (1, 4))
    if mean_rows > _MANY_ROWS:
        yield portable_tiles(4)[1]
        yield from (specialized_tiles(group)[1][1] for group in (1, 4, 8))
