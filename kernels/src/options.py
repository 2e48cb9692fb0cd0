"""Launch options: how the work is cut into programs. They change the speed, never the result.

They come from a table of what was measured on this device at this shape (`tables`), and otherwise from the heuristic
here, which reasons from the rows that an expert can expect:

- few rows (decode): the time is that of reading the weights once. Row blocks are as small as the matrix units allow
  (16), and each step of the pipeline loads a long run of every weight row (256 codes).
- many rows (prefill): the time is that of the matrix units and of bringing tiles to them. Tiles are as large as the
  registers hold, neighbouring programs share an expert's weights (`group_m`) while the second-level cache still holds
  them, and what an expert has beyond whole blocks joins its last one as a tail, so that its weights pass once.
"""

from dataclasses import dataclass, replace

from .backend import DeviceTraits
from .tables import LaunchOptions, RowBlocks, TileOptions, find_options

MIN_BLOCK_M = 16  # the smallest row count of the matrix instructions that Triton emits for int8
MAX_BLOCK_M = 128
_BARRIERS = 256  # bytes of shared memory for the barriers of copies through descriptors


@dataclass(frozen=True, slots=True)
class RowOptions:
    """Options of a kernel that walks rows: columns at a time (a power of two), warps, and rows at a time."""

    block: int
    num_warps: int
    rows: int = 1


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least `value` (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


def choose_launch_options(
    tokens: int, experts: int, top_k: int, hidden: int, intermediate: int, traits: DeviceTraits
) -> LaunchOptions:
    """Options for `tokens` tokens over `experts` experts of size [2 * intermediate, hidden], `top_k` a token."""
    found = find_options(traits.name, tokens, experts, top_k, hidden, intermediate)
    if found is None:
        found = heuristic_options(tokens, experts, top_k, intermediate)
    return fit_options(found, hidden, intermediate, traits)


def heuristic_options(tokens: int, experts: int, top_k: int, intermediate: int) -> LaunchOptions:
    """Options by the mean rows of an expert.

    The steps are those between which the fastest of some fifty tilings changed on an H200, over the shapes of
    MiniMax-M2, Qwen3-30B-A3B, Step-3.5-Flash and Mixtral-8x7B and 1 to 4096 tokens.
    """
    pairs, mean_rows = tokens * top_k, mean_rows_of(tokens, experts, top_k)
    if tokens == 1 or pairs * pairs <= experts:
        # So few pairs that two seldom share an expert.
        down = TileOptions(64, 512 if intermediate >= 4096 else 256, 1, num_warps=4, num_stages=3)
        return LaunchOptions(RowBlocks(16), TileOptions(128, 256, 1, num_warps=4, num_stages=3), down, sorted=False)
    if mean_rows <= 10:
        tile = TileOptions(64, 256, 1, num_warps=4, num_stages=3)
        return LaunchOptions(RowBlocks(16), tile, tile)
    if mean_rows <= 45:
        blocks, group = RowBlocks(32, tail_m=16, small_m=16), 4
    elif mean_rows <= 90:
        blocks, group = RowBlocks(64, tail_m=16, small_m=32), 4
    else:
        blocks, group = RowBlocks(128, tail_m=32, small_m=32), 8
    return LaunchOptions(
        blocks,
        gate_up=TileOptions(64, 128, group, num_warps=4, num_stages=3),
        down=TileOptions(128, 128, group, num_warps=4, num_stages=3),
    )


def mean_rows_of(tokens: int, experts: int, top_k: int) -> float:
    """Mean rows of the experts that can have any; the real counts are not known on the host."""
    pairs = tokens * top_k
    return pairs / max(min(experts, pairs), 1)


def choose_row_options(width: int) -> RowOptions:
    """Options for the row quantization of rows of `width` elements.

    Four rows a program, unless they are long: a program takes about as long for four short rows as for one, since most
    of that is the latency of its loads. The block is the largest that leaves at most an eighth of its lanes without an
    element: the work is as much arithmetic as memory.
    """
    long = width > 4096
    sizes = (2048, 1024, 512, 256) if long else (512, 256)
    block = next((size for size in sizes if -width % size <= width // 8), 128)
    return RowOptions(block, num_warps=4, rows=1 if long else 4)


def choose_combine_options(hidden: int) -> RowOptions:
    """Options for the reduction over a token's experts: narrow blocks, since each column reads top-k values."""
    block = min(max(next_power_of_2(hidden), 128), 1024)
    return RowOptions(block, num_warps=min(block // 128, 4))


def shared_bytes(tile: TileOptions, rows: int, weight_tiles: int) -> int:
    """Shared memory that the load pipeline of one program takes, in bytes (a code is one byte)."""
    return tile.num_stages * tile.block_k * (rows + weight_tiles * tile.block_n)


def fit_options(options: LaunchOptions, hidden: int, intermediate: int, traits: DeviceTraits) -> LaunchOptions:
    """Make options fit the device and the sizes."""
    rows = options.blocks.block_m + options.blocks.tail_m
    return replace(
        options,
        gate_up=_fit(options.gate_up, rows, hidden, 2, traits),
        down=_fit(options.down, rows, intermediate, 1, traits),
    )


def _fit(tile: TileOptions, rows: int, depth: int, weight_tiles: int, traits: DeviceTraits) -> TileOptions:
    """Make `tile` fit: no longer along the summed dimension than it is, no larger than shared memory."""
    block_k = min(tile.block_k, max(next_power_of_2(depth), 32))  # int8 matrix instructions take at least 32
    # AMD prefetches into registers: one buffer in LDS and one in flight is what its pipeliner is built for.
    stages = 2 if traits.platform == "hip" else tile.num_stages
    descriptors = tile.descriptors and traits.tensor_descriptors
    tile = replace(tile, block_k=block_k, num_stages=stages, descriptors=descriptors)
    while shared_bytes(tile, rows, weight_tiles) + _BARRIERS > traits.shared_memory and tile.block_n > 32:
        # Depth of the pipeline goes first, but not below two stages, where loads and products stop overlapping.
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_k > 64:
            tile = replace(tile, block_k=tile.block_k // 2)
        else:
            tile = replace(tile, block_n=tile.block_n // 2)
    return tile
