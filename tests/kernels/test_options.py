"""Launch options: whatever the shape and device, they can be launched."""

import itertools

import pytest

from quarkconv.kernels.backend import DeviceTraits
from quarkconv.kernels.options import (
    MAX_BLOCK_M,
    MIN_BLOCK_M,
    choose_combine_options,
    choose_launch_options,
    choose_row_options,
    next_power_of_2,
    shared_bytes,
)

DEVICES = [
    DeviceTraits("cuda", 227 * 1024),
    DeviceTraits("cuda", 99 * 1024),
    DeviceTraits("hip", 64 * 1024),
    DeviceTraits("hip", 160 * 1024),
    DeviceTraits("xpu", 128 * 1024),
    DeviceTraits("interpreter", 1 << 30),
]


def is_power_of_2(value):
    return value > 0 and value & (value - 1) == 0


@pytest.mark.parametrize("traits", DEVICES, ids=str)
def test_always_launchable(traits):
    for tokens, experts, top_k, width in itertools.product((1, 64, 4096), (1, 8, 256), (1, 8), (24, 88, 4096)):
        options = choose_launch_options(tokens, experts, top_k, width, width, traits)
        assert MIN_BLOCK_M <= options.block_m <= MAX_BLOCK_M
        assert is_power_of_2(options.block_m)
        for tile, weight_tiles in ((options.gate_up, 2), (options.down, 1)):
            assert is_power_of_2(tile.block_n)
            assert is_power_of_2(tile.block_k)
            assert tile.block_n >= 16
            assert tile.block_k >= 32
            assert tile.num_stages >= 2
            assert shared_bytes(tile, options.block_m, weight_tiles) <= traits.shared_memory


def test_rows_grow_with_the_tokens():
    blocks = [choose_launch_options(m, 256, 8, 3072, 1536, DEVICES[0]).block_m for m in (1, 64, 512, 4096)]
    assert blocks == sorted(blocks)
    assert blocks[0] == MIN_BLOCK_M
    assert blocks[-1] == MAX_BLOCK_M


def test_row_blocks_are_powers_of_two():
    for width in (1, 88, 128, 4096, 8192, 8193, 20000):
        assert is_power_of_2(choose_row_options(width).block)
        assert is_power_of_2(choose_combine_options(width).block)
    assert choose_row_options(2048).block == 2048
    assert choose_row_options(2049).block == 1024
    assert [next_power_of_2(v) for v in (0, 1, 2, 3, 4, 5)] == [1, 1, 2, 4, 4, 8]
