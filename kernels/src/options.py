"""Launch options: how the work is cut into programs. They change the speed, never the result.

They come from a table of what was measured on this device at this shape (`tables`), and otherwise from the heuristic
here, which reasons from the rows that an expert can expect:

- one row or none (one token): every pair reads its expert's weights for itself, straight into registers.
- few rows (decode): bound by reading the weights once. Row blocks are as small as the matrix units allow (16), and each
  step of the pipeline loads a long run of every weight row (256 codes).
- many rows (prefill): bound by the matrix units and by the tiles' way to them. Tiles are as large as the registers
  hold, neighbouring programs share an expert's weights (`group_m`) while L2 still holds them, and the rest of an
  expert's rows joins its last block as a tail, so that its weights pass once.
"""

import functools
from dataclasses import dataclass, replace

from .backend import DeviceTraits
from .tables import (
    GROUP_WARPS,
    HALF,
    GemvOptions,
    LaunchOptions,
    Options,
    RowBlocks,
    Shape,
    TileOptions,
    VectorTile,
    find_options,
)

_KEPT = 4096  # choices that are kept, since each forward asks again
MIN_BLOCK_M = 16  # the smallest row count of the matrix instructions that Triton emits for int8
MAX_BLOCK_M = 128
_WARP_CODES = 4 * 128 * 32  # weights that a warp may hold: 128 registers a thread, half of what there are
_NARROW = 384  # columns of gate-up in a slice of an expert
_NARROW_FOR_FEW_ROWS = 512  # the same at up to 45 mean rows, for specialized warps
_WIDE = 2048  # columns of an expert so large that few of them occupy all SMs
_LEAST_ROWS, _LEAST_CODES = 8, 5600  # of weights in a program of down's GEMV
_FEW_ROWS = 128  # about the number of SMs of a large GPU
_MOST_REPEATED = 30e6  # bytes of weights that pairs may read once more than needed: as long as sorting pairs takes
_DEEP = 4096  # rows of weights, so long that a program of a GEMV has few of them
_BARRIERS = 256  # bytes of shared memory for the barriers of copies through descriptors
_MOST_SUMS = 100  # int32 sums of a thread whose matrix instructions read operands from registers
_RESULTS = 6 * 1024  # the same with specialized warps, and the layout conversions of their results


@dataclass(frozen=True, slots=True)
class RowOptions:
    """Options of a kernel that walks rows: columns at a time (a power of two), warps, and rows at a time."""

    block: int
    num_warps: int
    rows: int = 1


def _floor_power_of_2(value: int) -> int:
    return 1 << (value.bit_length() - 1)


def next_power_of_2(value: int) -> int:
    """Smallest power of two that is at least `value` (and at least 1)."""
    return 1 << max(value - 1, 0).bit_length()


@functools.lru_cache(maxsize=_KEPT)
def choose_launch_options(
    tokens: int, experts: int, top_k: int, hidden: int, intermediate: int, traits: DeviceTraits, *, packed: bool = True
) -> Options:
    """Options for `tokens` tokens over `experts` experts of size [2 * intermediate, hidden], `top_k` a token.

    Not `packed`, four codes cannot be read as one int32, and all products take the matrix units. Raises ValueError if
    the device has none for int8 and the experts do not fit a GEMV.
    """
    if not traits.int8_matrix:
        gemv = gemv_options(top_k, hidden, intermediate) if packed else None
        if gemv is None:
            raise ValueError(
                f"experts of {hidden} x {intermediate}, {top_k} a token: too large or unaligned for a GPU without int8 "
                "matrix instructions in Triton (NVIDIA before sm_80)"
            )
        return gemv
    found = find_options(traits.name, tokens, experts, top_k, hidden, intermediate)
    shape = (experts, top_k, hidden, intermediate)
    if found is None and _reads_for_each_pair(tokens, shape):
        found = gemv_options(top_k, hidden, intermediate)
    if isinstance(found, GemvOptions) and packed:
        return fit_options(found, hidden, intermediate, traits)
    if not isinstance(found, LaunchOptions):
        found = heuristic_options(tokens, shape, specialized=traits.warp_specialization)
    return fit_options(found, hidden, intermediate, traits)


def _reads_for_each_pair(tokens: int, shape: Shape) -> bool:
    """Whether every pair should read its expert: the bytes that are read again, for uniform routing, take no longer
    than sorting the pairs. Rows of narrow experts that are long fill a GEMV's programs badly."""
    experts, top_k, hidden, intermediate = shape
    touched = experts * (1 - (1 - min(top_k / experts, 1)) ** tokens)
    repeated = (tokens * top_k - touched) * 3 * hidden * intermediate
    fills = hidden <= _DEEP or intermediate > _NARROW
    return repeated <= (_MOST_REPEATED if fills else _MOST_REPEATED / 4)


def gemv_options(top_k: int, hidden: int, intermediate: int) -> GemvOptions | None:
    """Options for so few pairs that two seldom share an expert; None where a program's weights do not fit.

    Narrow experts get narrow tiles of gate-up, so that all SMs have work. A program of down has at least 8 rows and
    5600 codes of weights: with fewer, its overhead shows.
    """
    slots = next_power_of_2(top_k)
    column = slots * intermediate
    columns, warps = min(_WARP_CODES * 4 // (2 * hidden), 8), next_power_of_2(-(-column // _WARP_CODES))
    if columns < 1 or warps > 16:
        return None
    gate_up = VectorTile(_floor_power_of_2(columns), num_warps=4)
    if intermediate <= _NARROW and columns > 1:
        gate_up = VectorTile(_floor_power_of_2(columns) // 2, num_warps=2)
    least = max(-(-_LEAST_CODES // column), _LEAST_ROWS // slots)
    most = _floor_power_of_2(max(_WARP_CODES // column, 1))
    return GemvOptions(gate_up, VectorTile(min(next_power_of_2(least), most, 4), num_warps=warps))


def fits_registers(options: GemvOptions, top_k: int, hidden: int, intermediate: int) -> bool:
    """Whether the programs' weights fit into their registers."""
    gate_up, down = options.gate_up, options.down
    return (
        2 * gate_up.block_n * hidden <= _WARP_CODES * gate_up.num_warps
        and next_power_of_2(top_k) * down.block_n * intermediate <= _WARP_CODES * down.num_warps
    )


def heuristic_options(tokens: int, shape: Shape, *, specialized: bool) -> LaunchOptions:
    """Options by the mean rows of an expert, where the device can have `specialized` warps or not.

    The thresholds are where the fastest tiling changed over models, slices and sizes that no table lists, on an H200;
    without specialized warps for 1 to 4096 tokens, with them for up to 16384 and on an H100 too. Where an expert has
    few blocks, gate-up is bound by memory, which is fastest when neighbouring programs read neighbouring rows of
    weights: group_m 1, so that they have the same expert.

    A row block is about as high as the mean: a higher one multiplies rows that are not there, a lower one reads an
    expert's weights again (docs/kernel-experiments.md).
    """
    experts, top_k, _, intermediate = shape
    mean_rows = mean_rows_of(tokens, experts, top_k)
    if mean_rows <= 10:
        return LaunchOptions(RowBlocks(16), *_tiles_for_few_rows(mean_rows, intermediate))
    tall, (ping_pong, cooperative) = RowBlocks(128, tail_m=32, small_m=64), specialized_tiles(group_m=4)
    low, middle = RowBlocks(32, small_m=16), RowBlocks(64, tail_m=32, small_m=32)
    gate_up, down = portable_tiles(group_m=4 if mean_rows <= 90 else 8)
    # Narrow experts multiply too little for each row that the specialized kernel's sorted codes cost.
    if specialized and intermediate > (_NARROW if mean_rows > 45 else _NARROW_FOR_FEW_ROWS):
        wide = cooperative[0] if mean_rows > 400 else replace(ping_pong[0], group_m=1)
        return LaunchOptions(low if mean_rows <= 24 else middle if mean_rows <= 90 else tall, wide, ping_pong[1])
    if mean_rows <= 24:
        narrow = _tiles_for_few_rows(mean_rows, intermediate)[1]
        by_width = narrow if intermediate <= 256 or (intermediate <= _NARROW and not specialized) else None
        return LaunchOptions(low, gate_up, by_width or (ping_pong[1] if specialized else down))
    if specialized:
        down = ping_pong[1]
    if mean_rows <= 45:
        return LaunchOptions(RowBlocks(32, tail_m=16, small_m=16), gate_up, down)
    if mean_rows <= 90:
        return LaunchOptions(middle if specialized else RowBlocks(64, tail_m=16, small_m=32), gate_up, down)
    return LaunchOptions(tall, gate_up, down)


def _tiles_for_few_rows(mean_rows: float, intermediate: int) -> tuple[TileOptions, TileOptions]:
    """Tiles of (gate-up, down) where each product is a read of the weights: long runs of each of their rows."""
    gate_up = TileOptions(64, 256, 1, num_warps=4, num_stages=3)
    if intermediate >= _WIDE and mean_rows < 4:
        gate_up = replace(gate_up, block_k=512)
    elif intermediate > _NARROW and mean_rows > 4:  # rows of tokens are gathered by pointers anyway
        gate_up = replace(gate_up, descriptors=False)
    if intermediate <= _NARROW_FOR_FEW_ROWS:
        return gate_up, TileOptions(256, 64, 1, num_warps=4, num_stages=3)
    if intermediate <= 1024:
        return gate_up, TileOptions(128, 128, 1, num_warps=4, num_stages=4)
    if intermediate <= _WIDE:
        return gate_up, TileOptions(64, 128, 1, num_warps=4, num_stages=5)
    return gate_up, TileOptions(64, 256, 1, num_warps=4, num_stages=3)


def portable_tiles(group_m: int) -> tuple[TileOptions, TileOptions]:
    """Tiles of (gate-up, down) for the portable kernel with many rows."""
    gate_up = TileOptions(64, 128, group_m, num_warps=4, num_stages=3)
    return gate_up, replace(gate_up, block_n=128)


def specialized_tiles(group_m: int) -> tuple[tuple[TileOptions, TileOptions], tuple[TileOptions, TileOptions]]:
    """Tiles of (gate-up, down) for specialized warps: ping-pong, and cooperative."""
    ping_pong = TileOptions(HALF, 128, group_m, num_warps=GROUP_WARPS, num_stages=6, specialized=True)
    cooperative = TileOptions(2 * HALF, 128, group_m, num_warps=2 * GROUP_WARPS, num_stages=4, specialized=True)
    return (ping_pong, replace(ping_pong, block_n=2 * HALF)), (cooperative, replace(cooperative, block_n=4 * HALF))


def even_depth(depth: int, block_k: int) -> int:
    """The largest step of the summed dimension, from `block_k` down to 64, that divides it; 128 where none does."""
    while block_k > 64 and depth % block_k:
        block_k //= 2
    return block_k if depth % block_k == 0 else 128


def mean_rows_of(tokens: int, experts: int, top_k: int) -> float:
    """Mean rows of the experts that can have any; the real counts are not known on the host."""
    pairs = tokens * top_k
    return pairs / max(min(experts, pairs), 1)


def choose_row_options(rows: int, width: int, *, copied: bool = False) -> RowOptions:
    """Options for the row quantization of `rows` rows of `width` elements, of which each is written once or `copied`.

    A program holds its rows in registers, at most a hundred values a thread. Few warps a program keep many programs,
    and so many rows, in flight; where there are few rows anyway, what counts is how long one takes. The block is as
    wide as 16-byte loads need, unless more than an eighth of its lanes would find no element.
    """
    at_once = 2 if width <= 2048 and rows > _FEW_ROWS and not copied else 1
    num_warps = 8 if width > 8192 else 4 if width > 3072 or rows <= _FEW_ROWS else 2
    sizes = (size for size in (2048, 1024, 512, 256) if size * at_once <= 256 * num_warps)
    block = next((size for size in sizes if -width % size <= width // 8), 128)
    return RowOptions(block, num_warps, at_once)


@functools.lru_cache(maxsize=_KEPT)
def choose_combine_options(hidden: int) -> RowOptions:
    """Options for the reduction over a token's experts: narrow blocks, since each column reads top-k values."""
    block = min(max(next_power_of_2(hidden), 128), 1024)
    return RowOptions(block, num_warps=min(block // 128, 4))


def shared_bytes(tile: TileOptions, rows: int, weight_tiles: int) -> int:
    """Shared memory that the load pipeline of one program takes, in bytes (a code is one byte)."""
    return tile.num_stages * tile.block_k * (rows + weight_tiles * tile.block_n)


def fit_options(options: Options, hidden: int, intermediate: int, traits: DeviceTraits) -> Options:
    """Make options fit the device and the sizes."""
    if isinstance(options, GemvOptions):
        if traits.rdna:  # without dp4a, unpacked codes take registers too
            wider = [replace(tile, num_warps=2 * tile.num_warps) for tile in (options.gate_up, options.down)]
            return replace(options, gate_up=wider[0], down=wider[1])
        return options
    blocks = options.blocks
    if traits.rdna or (traits.mma_sync and blocks.block_m + blocks.tail_m > MAX_BLOCK_M):
        blocks = replace(blocks, tail_m=0)  # a second accumulator would spill
    rows = blocks.block_m + blocks.tail_m
    return replace(
        options,
        blocks=blocks,
        gate_up=_fit(options.gate_up, rows, hidden, 2, traits),
        down=_fit(options.down, rows, intermediate, 1, traits),
    )


def _fit(tile: TileOptions, rows: int, depth: int, weight_tiles: int, traits: DeviceTraits) -> TileOptions:
    """Make `tile` fit: no longer along the summed dimension than it is, no larger than shared memory."""
    block_k = min(tile.block_k, max(next_power_of_2(depth), 32))  # int8 matrix instructions take at least 32
    if not traits.warp_specialization or block_k < tile.block_k:
        tile = tile.without_specialization()
    # AMD prefetches into registers: one buffer in LDS and one in flight is what its pipeliner is built for.
    stages = 2 if traits.platform == "hip" else tile.num_stages
    descriptors = tile.descriptors and traits.tensor_descriptors
    tile = replace(tile, block_k=block_k, num_stages=stages, descriptors=descriptors)
    if traits.rdna:
        tile = replace(tile, block_k=min(tile.block_k, 64))
    if traits.mma_sync or traits.platform == "hip":
        # Operands take registers too: sums are spread over more warps instead of spilling.
        most = (_MOST_SUMS // 2 if traits.rdna else _MOST_SUMS) * traits.warp_size
        while rows * tile.block_n * weight_tiles > most * tile.num_warps:
            tile = replace(tile, num_warps=2 * tile.num_warps)
    beside = _RESULTS if tile.specialized else _BARRIERS
    while shared_bytes(tile, rows, weight_tiles) + beside > traits.shared_memory:
        # Depth of the pipeline goes first, but not below two stages, where loads and products stop overlapping.
        if tile.num_stages > 2:
            tile = replace(tile, num_stages=tile.num_stages - 1)
        elif tile.block_k > 64:
            tile = replace(tile, block_k=tile.block_k // 2)
        elif tile.block_n > 32:
            tile = replace(tile, block_n=tile.block_n // 2)
        else:
            break
    return tile
