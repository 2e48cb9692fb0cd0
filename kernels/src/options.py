"""Launch options: how the work is cut into programs. They change the speed, never the result.

The heuristic here is the answer for every device and shape; it reasons from the rows an expert can expect:

- few rows (decode): the time is that of reading the weights once. Row blocks are as small as the matrix units allow
  (16), and each step of the pipeline loads a long run of every weight row (256 codes).
- many rows (prefill): the time is that of the matrix units. Tiles grow until each byte loaded is used often enough,
  and neighbouring programs share an expert's weights (`group_m`) while the second-level cache still holds them.
"""

from dataclasses import dataclass, replace

from .backend import DeviceTraits

MIN_BLOCK_M = 16  # the smallest row count of the matrix instructions that Triton emits for int8
MAX_BLOCK_M = 128


@dataclass(frozen=True, slots=True)
class TileOptions:
    """How one grouped product is tiled.

    block_n   output columns a program computes (for gate-up: of the gate and of the up half each)
    block_k   codes of the summed dimension loaded at a time
    group_m   row blocks walked before the next column tile, for reuse of the weights in cache
    num_warps, num_stages   Triton's warps per program and depth of the load pipeline
    """

    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """Options of one forward. `block_m`, the rows of a tile, is shared: the routing pads each expert to it."""

    block_m: int
    gate_up: TileOptions
    down: TileOptions


@dataclass(frozen=True, slots=True)
class RowOptions:
    """Options of a kernel that walks rows: columns at a time (a power of two) and warps."""

    block: int
    num_warps: int


# (gate-up, down) for each block_m: the fastest, or within a few percent of it, of some thirty tiles timed on an H200 at
# the sizes of MiniMax-M2, Qwen3-30B-A3B and Mixtral-8x7B, 1 to 4096 tokens.
_TILES = {
    16: (TileOptions(64, 256, 1, num_warps=4, num_stages=3), TileOptions(64, 256, 1, num_warps=4, num_stages=3)),
    32: (TileOptions(64, 128, 1, num_warps=4, num_stages=4), TileOptions(128, 256, 1, num_warps=4, num_stages=3)),
    64: (TileOptions(64, 128, 8, num_warps=4, num_stages=3), TileOptions(128, 128, 8, num_warps=4, num_stages=3)),
    128: (TileOptions(64, 128, 8, num_warps=4, num_stages=3), TileOptions(128, 128, 8, num_warps=4, num_stages=3)),
}


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least `value` (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def choose_launch_options(
    tokens: int, experts: int, top_k: int, hidden: int, intermediate: int, traits: DeviceTraits
) -> LaunchOptions:
    """Options for `tokens` tokens over `experts` experts of size [2 * intermediate, hidden], `top_k` a token.

    The rows of an expert are not known on the host; their mean over the experts that can have any stands for them.
    """
    pairs = tokens * top_k
    mean_rows = pairs / max(min(experts, pairs), 1)
    # Half as many again as the mean: an expert just over a block would pay for a second, nearly empty one.
    block_m = min(max(next_power_of_2(int(mean_rows * 1.5)), MIN_BLOCK_M), MAX_BLOCK_M)
    gate_up, down = _TILES[block_m]
    return LaunchOptions(
        block_m,
        gate_up=_fit(gate_up, block_m, hidden, 2, traits),
        down=_fit(down, block_m, intermediate, 1, traits),
    )


def choose_row_options(width: int) -> RowOptions:
    """Options for a kernel with one program a row of `width` elements.

    Rows up to 2048 stay in registers. Longer ones go through in blocks of 1024, twice, the second time from cache:
    1024 divides most hidden sizes, and more programs fit on a processor than with the whole row in registers.
    """
    if width <= 2048:
        block = max(next_power_of_2(width), 128)
        return RowOptions(block, num_warps=max(block // 512, 1))
    return RowOptions(1024, num_warps=4 if width <= 4096 else 8)


def choose_combine_options(hidden: int) -> RowOptions:
    """Options for the reduction over a token's experts: narrow blocks, since each column reads top-k values."""
    block = min(max(next_power_of_2(hidden), 128), 1024)
    return RowOptions(block, num_warps=min(block // 128, 4))


def shared_bytes(tile: TileOptions, block_m: int, weight_tiles: int) -> int:
    """Shared memory that the load pipeline of one program takes, in bytes (a code is one byte)."""
    return tile.num_stages * tile.block_k * (block_m + weight_tiles * tile.block_n)


def _fit(tile: TileOptions, block_m: int, depth: int, weight_tiles: int, traits: DeviceTraits) -> TileOptions:
    """Make `tile` fit the device: no longer along the summed dimension than it is, no larger than shared memory."""
    block_k = min(tile.block_k, max(next_power_of_2(depth), 32))  # int8 matrix instructions take at least 32
    # AMD prefetches into registers: one buffer in LDS and one in flight is what its pipeliner is built for.
    stages = 2 if traits.platform == "hip" else tile.num_stages
    tile = replace(tile, block_k=block_k, num_stages=stages)
    while shared_bytes(tile, block_m, weight_tiles) > traits.shared_memory and tile.block_n > 32:
        # Depth of the pipeline goes first, but not below two stages, where loads and products stop overlapping.
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_k > 64:
            tile = replace(tile, block_k=tile.block_k // 2)
        else:
            tile = replace(tile, block_n=tile.block_n // 2)
    return tile
