# mypy: ignore-errors
"""The products for few rows (GEMV); `launch.grouped_gemm` defines the arithmetic.

With one or two rows per expert, a product is a read of the weights. A matrix instruction would compute 16 columns for
one, and its operands would pass through shared memory in a pipeline of a few stages. Here a program loads all of its
weights into registers at once, four codes to an int32, before it waits for the launch before it, and multiplies them
with dp4a. Products of codes are exact in any order.

D4 is the number of int32 in a row: D / 4. A row is walked in CHUNKS pieces of BLOCK_D int32.
"""

import triton
import triton.language as tl

from .cast import _to_dtype
from .dependent import _trigger, _wait
from .epilogue import _activate, _dequantized


@triton.jit
def _dot4(w, x, sums, DOT4: tl.constexpr):
    """sums + the sum of the products of the four codes in each int32 of w and x: one instruction, or twelve."""
    if DOT4:
        sums = tl.inline_asm_elementwise(
            "dp4a.s32.s32 $0, $1, $2, $3;", "=r,r,r,r", [w, x, sums], dtype=tl.int32, is_pure=True, pack=1
        )
    else:
        for shift in tl.static_range(0, 32, 8):
            sums += ((w << (24 - shift)) >> 24) * ((x << (24 - shift)) >> 24)
    return sums


@triton.jit
def _load_rows(ptr, rows, D4, is_row, BLOCK_D: tl.constexpr, CHUNKS: tl.constexpr, EVEN_D: tl.constexpr):
    """The rows [s, n] of a matrix [., D4], zeros where `is_row` [s, 1] (None: all) is false: a tuple of CHUNKS tiles
    [s, n, BLOCK_D]."""
    depth = tl.arange(0, BLOCK_D)[None, None, :]
    ptrs = ptr + rows[:, :, None] * D4 + depth
    tiles = ()
    for i in tl.static_range(CHUNKS):
        mask = None if is_row is None else is_row[:, :, None]
        if not EVEN_D:
            in_row = depth < D4 - i * BLOCK_D
            mask = in_row if mask is None else mask & in_row
        tiles += (tl.load(ptrs + i * BLOCK_D, mask=mask, other=None if mask is None else 0),)
    return tiles


@triton.jit
def _dot_rows(w, x, SETS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, DOT4: tl.constexpr):
    """Sums [SETS, BLOCK_N] over the last dimension of the tiles w and x."""
    sums = tl.zeros([SETS, BLOCK_N, BLOCK_D], dtype=tl.int32)
    for i in tl.static_range(len(w)):
        sums = _dot4(w[i], x[i], sums, DOT4)
    return tl.sum(sums, axis=2)


@triton.jit
def _channel(ptr, expert, first, cols, num_cols, total_cols, PER_CHANNEL: tl.constexpr):
    """Scale or bias [s, n] of the columns first + cols of the experts [s, 1], or [s, 1] where it is per tensor."""
    if PER_CHANNEL:
        values = tl.load(ptr + expert * total_cols + first + cols, mask=cols < num_cols, other=0.0)
    else:
        values = tl.load(ptr + expert)
    return values


@triton.jit(do_not_specialize=["num_experts"])
def grouped_gate_up_gemv_kernel(
    codes_ptr,  # i32 [R, D4]
    row_scale_ptr,  # f32 [R]
    weight_ptr,  # i32 [E, 2N, D4]: N gate rows, then N up rows; [E, N, D4] where not GATED
    weight_scale_ptr,  # f32 [E, 2N], [E, N] or [E]
    bias_ptr,  # float [E, 2N] or [E, N], or None
    router_weight_ptr,  # f32 [P] or None
    out_ptr,  # float [P, N]
    topk_ids_ptr,  # int [P]
    num_experts,
    D4,
    N,
    limit,
    alpha,
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    GATED: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    DOT4: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Grid: (column tiles, pairs). A program computes BLOCK_N columns of h for one pair, from gate and up; it
    ends at once where another rank has the expert."""
    cols = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    pair = tl.program_id(1).to(tl.int64)
    expert = tl.load(topk_ids_ptr + pair).to(tl.int64)
    if (expert < 0) | (expert >= num_experts):
        _wait(DEPENDENT)
        _trigger(DEPENDENT)
        return
    pair += tl.zeros([1, 1], dtype=tl.int64)
    expert += tl.zeros([1, 1], dtype=tl.int64)
    total_cols = 2 * N if GATED else N
    rows = expert * total_cols + tl.where(cols < N, cols, 0)
    gate_w = _load_rows(weight_ptr, rows, D4, None, BLOCK_D, CHUNKS, EVEN_D)
    if GATED:
        up_w = _load_rows(weight_ptr, rows + N, D4, None, BLOCK_D, CHUNKS, EVEN_D)
    gate_scale = _channel(weight_scale_ptr, expert, 0, cols, N, total_cols, PER_CHANNEL)
    if GATED:
        up_scale = _channel(weight_scale_ptr, expert, N, cols, N, total_cols, PER_CHANNEL)
    gate_bias, up_bias = None, None
    if bias_ptr is not None:
        gate_bias = _channel(bias_ptr, expert, 0, cols, N, total_cols, True)
        if GATED:
            up_bias = _channel(bias_ptr, expert, N, cols, N, total_cols, True)
    _wait(DEPENDENT)
    _trigger(DEPENDENT)

    # Every column's row of the tile loads the codes anew, from the nearest cache: that spares an exchange of them
    # between threads.
    row = pair // PAIRS_PER_ROW
    x = _load_rows(codes_ptr, row + tl.zeros_like(rows), D4, None, BLOCK_D, CHUNKS, EVEN_D)
    row_scale = tl.load(row_scale_ptr + row)
    if router_weight_ptr is not None:
        row_scale *= tl.load(router_weight_ptr + pair)
    gate = _dequantized(_dot_rows(gate_w, x, 1, BLOCK_N, BLOCK_D, DOT4), row_scale, gate_scale, gate_bias)
    if GATED:
        up = _dequantized(_dot_rows(up_w, x, 1, BLOCK_N, BLOCK_D, DOT4), row_scale, up_scale, up_bias)
        activated = _activate(gate, up, limit, alpha, ACTIVATION)
    else:
        activated = _activate(None, gate, limit, alpha, ACTIVATION)
    out = _to_dtype(activated, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + pair * N + cols, out, mask=cols < N)


@triton.jit(do_not_specialize=["num_experts"])
def combined_down_gemv_kernel(
    codes_ptr,  # i32 [P, D4]
    row_scale_ptr,  # f32 [P]
    weight_ptr,  # i32 [E, N, D4]
    weight_scale_ptr,  # f32 [E, N] or [E]
    bias_ptr,  # float [E, N] or None
    router_weight_ptr,  # f32 [P] or None
    out_ptr,  # float [M, N]
    topk_ids_ptr,  # int [P]
    num_experts,
    D4,
    N,
    TOP_K: tl.constexpr,
    SLOTS: tl.constexpr,  # the power of two from TOP_K
    PER_CHANNEL: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    DOT4: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Grid: (column tiles, tokens). A program computes BLOCK_N columns of y for all slots of one token, and their sum
    in the order of `combine`."""
    token = tl.program_id(1).to(tl.int64)
    cols = (tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N))[None, :]
    slots = tl.arange(0, SLOTS)[:, None]
    pairs = token * TOP_K + slots
    expert = tl.load(topk_ids_ptr + pairs, mask=slots < TOP_K, other=-1).to(tl.int64)
    here = (expert >= 0) & (expert < num_experts)
    expert = tl.where(here, expert, 0)
    w = _load_rows(weight_ptr, expert * N + tl.where(cols < N, cols, 0), D4, here, BLOCK_D, CHUNKS, EVEN_D)
    scale = _channel(weight_scale_ptr, expert, 0, cols, N, N, PER_CHANNEL)
    bias = None
    if bias_ptr is not None:
        bias = _channel(bias_ptr, expert, 0, cols, N, N, True)
    _wait(DEPENDENT)
    _trigger(DEPENDENT)

    x = _load_rows(codes_ptr, pairs + tl.zeros_like(cols), D4, here, BLOCK_D, CHUNKS, EVEN_D)
    row_scale = tl.load(row_scale_ptr + pairs, mask=here, other=0.0)
    router_weight = None
    if router_weight_ptr is not None:
        router_weight = tl.load(router_weight_ptr + pairs, mask=here, other=0.0)
    y = _dequantized(_dot_rows(w, x, SLOTS, BLOCK_N, BLOCK_D, DOT4), row_scale, scale, bias)
    y = tl.where(here, _to_dtype(y, out_ptr.dtype.element_ty, INTERPRETED).to(tl.float32), 0.0)
    total = tl.zeros([BLOCK_N], dtype=tl.float32)
    for slot in tl.static_range(TOP_K):
        # A sum of one value and zeros picks the value.
        value = tl.sum(tl.where(slots == slot, y, 0.0), axis=0)
        if router_weight is None:
            total += value
        else:
            total = tl.fma(value, tl.sum(tl.where(slots == slot, router_weight, 0.0)) + tl.zeros_like(value), total)
    out_cols = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    tl.store(out_ptr + token * N + out_cols, _to_dtype(total, out_ptr.dtype.element_ty, INTERPRETED), mask=out_cols < N)
