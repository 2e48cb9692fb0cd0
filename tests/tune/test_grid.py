"""Which tiles are timed: those that can be launched, few of them, and those that won before among them."""

from __future__ import annotations

from typing import Any

import pytest

from quarkconv.tune.grid import Tile, starts, tile_of, variations
from quarkconv.tune.shapes import RankShape, whole
from quarkconv.tune.tune import TOKENS

SHARED = 227 * 1024
"""Bytes of shared memory of a program on an H100 or H200."""
MINIMAX, QWEN, STEP, MIXTRAL = (
    whole(256, 8, 3072, 1536), whole(128, 8, 2048, 768), whole(288, 8, 4096, 1280), whole(8, 2, 4096, 14336)
)  # fmt: skip
SHAPES = (MINIMAX, QWEN, STEP, MIXTRAL, whole(512, 10, 2048, 128), RankShape(32, 8, 7168, 2048, 256))

WON: dict[tuple[RankShape, int], tuple[int, ...]] = {
    (MINIMAX, 8): (16, 64, 128, 1, 4, 3),
    (MINIMAX, 64): (16, 64, 256, 1, 4, 4),
    (MINIMAX, 512): (32, 128, 128, 1, 4, 4),
    (MINIMAX, 4096): (64, 128, 128, 16, 4, 4),
    (QWEN, 1): (16, 64, 128, 1, 4, 5),
    (QWEN, 512): (64, 128, 128, 1, 4, 4),
    (QWEN, 4096): (64, 128, 128, 16, 4, 4),
    (STEP, 512): (32, 128, 128, 1, 4, 4),
    (STEP, 4096): (64, 256, 128, 1, 8, 4),
    (MIXTRAL, 1): (16, 64, 256, 1, 4, 5),
    (MIXTRAL, 512): (64, 128, 128, 1, 4, 4),
    (MIXTRAL, 4096): (64, 128, 128, 16, 4, 3),
}
"""The fastest of 12 to 96 tiles of vLLM 0.25.1's kernel on an H200."""


@pytest.mark.parametrize(("shape", "tokens"), WON, ids=str)
def test_tiles_that_won_before_are_reached(shape: RankShape, tokens: int) -> None:
    first = starts(shape, tokens, SHARED)
    reached = {*first, *(found for tile in first for found in variations(tile, shape, tokens, SHARED))}
    assert Tile(*WON[shape, tokens]) in reached


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("tokens", [*TOKENS, 65536])
def test_tiles_are_few_and_can_be_launched(shape: RankShape, tokens: int) -> None:
    first = starts(shape, tokens, SHARED)
    assert 2 <= len(first) == len(set(first)) <= 22
    for tile in first:
        around = variations(tile, shape, tokens, SHARED)
        assert tile not in around
        assert len(set(around)) == len(around) <= 8
        for each in (tile, *around):
            assert each.num_stages * (each.block_m + each.block_n) * each.block_k <= SHARED
            assert each.block_m * each.block_n / (32 * each.num_warps) <= 128  # int32 sums of a thread
            assert each.block_m <= max(16, 2.5 * shape.mean_rows(tokens))


def test_a_gpu_with_little_shared_memory_gets_smaller_tiles() -> None:
    small = starts(MIXTRAL, 4096, 64 * 1024)
    assert small
    assert (
        max(tile.shared_memory() for tile in small)
        <= 64 * 1024
        < max(tile.shared_memory() for tile in starts(MIXTRAL, 4096, SHARED))
    )


def test_groups_of_row_blocks_only_where_an_expert_has_several() -> None:
    tile = Tile(16, 64, 128, 1, 4, 4)
    assert {each.group_m for each in variations(tile, MINIMAX, 64, SHARED)} == {1}
    assert {each.group_m for each in variations(tile, MIXTRAL, 4096, SHARED)} == {1, 4, 16}


def test_an_entry_of_a_table_is_a_tile_and_back() -> None:
    tile = Tile(16, 64, 128, 1, 4, 3)
    assert tile_of(tile.to_json()) == tile
    assert tile_of({**tile.to_json(), "SPLIT_K": 1}) == tile
    left_to_triton = {key: value for key, value in tile.to_json().items() if not key.startswith("num_")}
    assert tile_of(left_to_triton) == tile


@pytest.mark.parametrize(
    "change", [{"SPLIT_K": 2}, {"BLOCK_SIZE_M": 0}, {"BLOCK_SIZE_M": "16"}, {"USE_TMA": True}, {"num_warps": 4.0}]
)
def test_an_entry_that_is_not_a_tile_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="launch options: expected"):
        tile_of({**Tile(16, 64, 128, 1, 4, 3).to_json(), **change})
    with pytest.raises(ValueError, match="launch options: expected"):
        tile_of({"BLOCK_SIZE_M": 16})
