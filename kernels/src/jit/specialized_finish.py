# mypy: ignore-errors
"""The epilogue of `jit.specialized`: scales, bias, activation and stores, of PIECE rows at a time.

It is a loop whose rows are always in the same registers: after each turn the next rows move there. Unrolled for 128
rows, for short blocks, for tails, and for each consumer, it was 192 KB of instructions, more than an SM's instruction
cache holds, and the consumers spent two fifths of their time waiting for instructions.

Sums are i32 [HALF, rows] of a lower and an upper half: gate and up, or two runs of columns of down.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .. import tables
from .epilogue import _activate

HALF = tl.constexpr(tables.HALF)
# Of results: eight columns a thread, so that its stores are 16 bytes wide and a row's are 128 bytes in one piece.
_EIGHT_COLUMNS = gl.constexpr(gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1]))


@gluon.constexpr_function
def _layout_of_sums(rows):
    """How four warps hold sums [HALF, rows]: as matrix instructions leave them."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, rows, 32])


@gluon.jit
def _pieces(sums, PIECE: gl.constexpr):
    """[HALF, n] as a tuple of [HALF, PIECE]; nothing moves."""
    HALVES: gl.constexpr = sums.shape[1] // 2
    if sums.shape[1] == PIECE:
        LAYOUT: gl.constexpr = _layout_of_sums(PIECE)
        pieces = (gl.convert_layout(sums, LAYOUT, assert_trivial=True),)
    else:
        first, second = gl.split(gl.permute(gl.reshape(sums, [HALF, 2, HALVES]), (0, 2, 1)))
        pieces = _pieces(first, PIECE) + _pieces(second, PIECE)
    return pieces


@gluon.jit
def _none(COUNT: gl.constexpr, PIECE: gl.constexpr):
    """COUNT pieces whose values are never read."""
    LAYOUT: gl.constexpr = _layout_of_sums(PIECE)
    pieces = ()
    for _ in gl.static_range(COUNT):
        pieces += (gl.zeros([HALF, PIECE], gl.int32, LAYOUT),)
    return pieces


@gluon.jit
def _next(pieces):
    """The pieces without the first one; the last one is there twice, so that their number stays."""
    LAST: gl.constexpr = len(pieces) - 1
    moved = ()
    for i in gl.static_range(LAST):
        moved += (pieces[i + 1],)
    moved += (pieces[LAST],)
    return moved


@gluon.jit
def _channels(expert, col, N, total_cols, result, PER_CHANNEL: gl.constexpr, PIECE: gl.constexpr):
    """(scale, bias) of the columns col + 0..HALF-1, of which N are in range: f32 [HALF, 1] or a scalar; (scale,)."""
    out_ptr, row_scale_ptr, weight_scale_ptr, bias_ptr, router_weight_ptr = result
    LAYOUT: gl.constexpr = gl.SliceLayout(1, _layout_of_sums(PIECE))
    cols = col + gl.arange(0, HALF, LAYOUT)
    channels = expert.to(gl.int64) * total_cols + cols
    if PER_CHANNEL:
        scale = gl.load(weight_scale_ptr + channels, mask=cols < N, other=0.0)[:, None]
    else:
        scale = gl.load(weight_scale_ptr + expert)
    found = (scale,)
    if bias_ptr is not None:
        found += (gl.load(bias_ptr + channels, mask=cols < N, other=0.0).to(gl.float32)[:, None],)
    return found


@gluon.jit
def _channels_of_halves(expert, columns, result, PER_CHANNEL: gl.constexpr, PIECE: gl.constexpr):
    col, upper_col, N, total_cols = columns
    lower = _channels(expert, col, N, total_cols, result, PER_CHANNEL, PIECE)
    return lower, _channels(expert, upper_col, total_cols, total_cols, result, PER_CHANNEL, PIECE)


@gluon.jit
def _of_rows(offset, block, pairs_ptr, result, SORTED: gl.constexpr, PIECE: gl.constexpr):
    """Of the rows from `offset` of a block, past its end of its last one: (scales f32 [PIECE] as the sums are laid out,
    rows of the result i32 [PIECE] as results are)."""
    expert, first, rows, col_block = block
    out_ptr, row_scale_ptr, weight_scale_ptr, bias_ptr, router_weight_ptr = result
    LAYOUT: gl.constexpr = gl.SliceLayout(0, _layout_of_sums(PIECE))
    row = first + gl.minimum(offset + gl.arange(0, PIECE, LAYOUT), rows - 1)
    scale = gl.load(row_scale_ptr + row)
    if router_weight_ptr is not None:
        scale *= gl.load(router_weight_ptr + gl.load(pairs_ptr + row))
    target = first + gl.minimum(offset + gl.arange(0, PIECE, gl.SliceLayout(0, _EIGHT_COLUMNS)), rows - 1)
    if not SORTED:
        target = gl.load(pairs_ptr + target)
    return scale, target


@gluon.jit
def _dequantized(sums, row_scale, channels):
    """sums * row scale * weight scale + bias."""
    values = sums.to(gl.float32) * row_scale[None, :]
    if len(channels) == 1:
        values *= channels[0]
    else:
        LAYOUT: gl.constexpr = values.type.layout
        zeros = gl.zeros([HALF, sums.shape[1]], gl.float32, LAYOUT)
        values = gl.fma(values, channels[0] + zeros, channels[1] + zeros)
    return values


@gluon.jit
def _put(values, target, is_row, col, N, total_cols, out_ptr):
    """Store [HALF, rows] to the columns col + 0..HALF-1, of which N are in range."""
    cols = col + gl.arange(0, HALF, gl.SliceLayout(1, _EIGHT_COLUMNS))
    out_ptrs = out_ptr + (target.to(gl.int64) * total_cols)[None, :] + cols[:, None]
    values = gl.convert_layout(values.to(out_ptr.dtype.element_ty), _EIGHT_COLUMNS)
    gl.store(out_ptrs, values, mask=is_row[None, :] & (cols < N)[:, None])


@gluon.jit
def _finish(
    lower, upper, channels, ahead, block, pairs_ptr, columns, result, limits, GATED: gl.constexpr, SORTED: gl.constexpr,
    ACTIVATION: gl.constexpr, RAW_SUMS: gl.constexpr, PIECE: gl.constexpr,
):  # fmt: skip
    """Results of the sums, which are as many pieces as a block can have; `ahead` is `_of_rows` of the first."""
    expert, first, rows, col_block = block
    col, upper_col, N, total_cols = columns
    limit, alpha = limits
    out_ptr = result[0]
    row_scale, target = ahead
    for offset in range(0, rows, PIECE):
        next_scale, next_target = _of_rows(offset + PIECE, block, pairs_ptr, result, SORTED, PIECE)
        is_row = offset + gl.arange(0, PIECE, gl.SliceLayout(0, _EIGHT_COLUMNS)) < rows
        if RAW_SUMS:
            _put(lower[0], target, is_row, col, N, total_cols, out_ptr)
            _put(upper[0], target, is_row, upper_col, total_cols, total_cols, out_ptr)
        else:
            first_half = _dequantized(lower[0], row_scale, channels[0])
            second_half = _dequantized(upper[0], row_scale, channels[1])
            if GATED:
                h = _activate(first_half, second_half, limit, alpha, ACTIVATION)
                _put(h, target, is_row, col, N, N, out_ptr)
            else:
                if SORTED:
                    first_half = _activate(None, first_half, limit, alpha, ACTIVATION)
                    second_half = _activate(None, second_half, limit, alpha, ACTIVATION)
                _put(first_half, target, is_row, col, N, N, out_ptr)
                _put(second_half, target, is_row, upper_col, N, N, out_ptr)
        lower, upper, row_scale, target = _next(lower), _next(upper), next_scale, next_target
