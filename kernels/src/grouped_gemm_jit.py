# mypy: ignore-errors
"""Jitted code of the grouped products; `grouped_gemm` defines the arithmetic and launches it.

D is the summed dimension (H for gate-up, I for down) and N the output columns (I and H).
"""

import triton
import triton.language as tl

from .cast_jit import _to_dtype


@triton.jit
def _tile_of(program, num_row_blocks, num_col_blocks, GROUP_M: tl.constexpr):
    """(row block, column block) of a program: GROUP_M row blocks share a column of weights before the next column."""
    per_group = GROUP_M * num_col_blocks
    first = (program // per_group) * GROUP_M
    height = tl.minimum(num_row_blocks - first, GROUP_M)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), written with exp(-|x|) so that nothing overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _clamp_max(x, limit):
    return tl.where(x > limit, limit, x)  # unlike a hardware minimum, keeps a NaN


@triton.jit
def _activate(gate, up, limit, alpha, ACTIVATION: tl.constexpr):
    """The formulas of `activations`, in float32."""
    if ACTIVATION == "silu":
        out = gate * _sigmoid(gate) * up
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z): no tanh needed, and no cancellation in the negative tail.
        z = 0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate)
        out = gate * _sigmoid(2.0 * z) * up
    else:
        up = -_clamp_max(-_clamp_max(up, limit), limit)
        if ACTIVATION == "swiglustep":
            out = _clamp_max(gate * _sigmoid(gate), limit) * up
        else:
            tl.static_assert(ACTIVATION == "swigluoai")
            gate = _clamp_max(gate, limit)
            out = gate * _sigmoid(alpha * gate) * (up + 1.0)
    return out


@triton.jit
def _scaled(sums, row_scale, scale_ptr, bias_ptr, expert, first, cols, num_cols, total_cols, PER_CHANNEL: tl.constexpr):
    """sums * row_scale * weight scale + bias; columns first + cols of the total_cols of this expert."""
    in_range = cols < num_cols
    if PER_CHANNEL:
        scale = tl.load(scale_ptr + expert * total_cols + first + cols, mask=in_range, other=0.0)[None, :]
    else:
        scale = tl.load(scale_ptr + expert)
    # One scale after the other: the product of the two scales could leave float32's range where the result does not.
    values = sums.to(tl.float32) * row_scale[:, None] * scale
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * total_cols + first + cols, mask=in_range, other=0.0)
        values += bias.to(tl.float32)[None, :]
    return values


@triton.jit(do_not_specialize=["num_pairs"])
def grouped_gate_up_kernel(
    codes_ptr,  # i8 [R, D]
    row_scale_ptr,  # f32 [R]
    weight_ptr,  # i8 [E, 2N, D]: N gate rows, then N up rows
    weight_scale_ptr,  # f32 [E, 2N] or [E]
    bias_ptr,  # float [E, 2N] or None
    router_weight_ptr,  # f32 [P] or None
    out_ptr,  # float [P, N], or i32 [P, 2N] for RAW_SUMS
    pairs_ptr,  # i32 [max_blocks * BLOCK_M]
    block_expert_ptr,  # i32 [max_blocks]
    num_blocks_ptr,  # i32 [1]
    num_pairs,
    D,
    N,
    limit,
    alpha,
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RAW_SUMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_blocks = tl.load(num_blocks_ptr)
    num_col_blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    if program >= num_blocks * num_col_blocks:
        return
    row_block, col_block = _tile_of(program, num_blocks, num_col_blocks, GROUP_M)
    expert = tl.load(block_expert_ptr + row_block).to(tl.int64)
    pairs = tl.load(pairs_ptr + row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    is_row = pairs < num_pairs
    rows = pairs // PAIRS_PER_ROW

    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    # Columns past the end read column 0 again, which spares the loads a mask; the store drops them.
    safe_cols = tl.where(cols < N, cols, 0)
    depth = tl.arange(0, BLOCK_D)
    a_ptrs = codes_ptr + rows[:, None] * D + depth[None, :]
    gate_ptrs = weight_ptr + expert * (2 * N) * D + safe_cols[None, :] * D + depth[:, None]
    up_ptrs = gate_ptrs + N * D

    gate_sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    up_sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(a_ptrs, mask=is_row[:, None], other=0)
            gate_w = tl.load(gate_ptrs)
            up_w = tl.load(up_ptrs)
        else:
            in_depth = depth < D - start
            a = tl.load(a_ptrs, mask=is_row[:, None] & in_depth[None, :], other=0)
            gate_w = tl.load(gate_ptrs, mask=in_depth[:, None], other=0)
            up_w = tl.load(up_ptrs, mask=in_depth[:, None], other=0)
        gate_sums = tl.dot(a, gate_w, acc=gate_sums, out_dtype=tl.int32)
        up_sums = tl.dot(a, up_w, acc=up_sums, out_dtype=tl.int32)
        a_ptrs += BLOCK_D
        gate_ptrs += BLOCK_D
        up_ptrs += BLOCK_D

    is_out = is_row[:, None] & (cols < N)[None, :]
    if RAW_SUMS:
        out_ptrs = out_ptr + pairs[:, None] * (2 * N) + cols[None, :]
        tl.store(out_ptrs, gate_sums, mask=is_out)
        tl.store(out_ptrs + N, up_sums, mask=is_out)
    else:
        row_scale = tl.load(row_scale_ptr + rows, mask=is_row, other=0.0)
        if router_weight_ptr is not None:
            row_scale *= tl.load(router_weight_ptr + pairs, mask=is_row, other=0.0)
        gate = _scaled(gate_sums, row_scale, weight_scale_ptr, bias_ptr, expert, 0, cols, N, 2 * N, PER_CHANNEL)
        up = _scaled(up_sums, row_scale, weight_scale_ptr, bias_ptr, expert, N, cols, N, 2 * N, PER_CHANNEL)
        out = _to_dtype(_activate(gate, up, limit, alpha, ACTIVATION), out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + pairs[:, None] * N + cols[None, :], out, mask=is_out)


@triton.jit(do_not_specialize=["num_pairs"])
def grouped_down_kernel(
    codes_ptr,  # i8 [P, D]
    row_scale_ptr,  # f32 [P]
    weight_ptr,  # i8 [E, N, D]
    weight_scale_ptr,  # f32 [E, N] or [E]
    bias_ptr,  # float [E, N] or None
    out_ptr,  # float [P, N], or i32 [P, N] for RAW_SUMS
    pairs_ptr,  # i32 [max_blocks * BLOCK_M]
    block_expert_ptr,  # i32 [max_blocks]
    num_blocks_ptr,  # i32 [1]
    num_pairs,
    D,
    N,
    PER_CHANNEL: tl.constexpr,
    RAW_SUMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    num_blocks = tl.load(num_blocks_ptr)
    num_col_blocks = tl.cdiv(N, BLOCK_N)
    program = tl.program_id(0)
    if program >= num_blocks * num_col_blocks:
        return
    row_block, col_block = _tile_of(program, num_blocks, num_col_blocks, GROUP_M)
    expert = tl.load(block_expert_ptr + row_block).to(tl.int64)
    pairs = tl.load(pairs_ptr + row_block * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    is_row = pairs < num_pairs

    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    safe_cols = tl.where(cols < N, cols, 0)
    depth = tl.arange(0, BLOCK_D)
    a_ptrs = codes_ptr + pairs[:, None] * D + depth[None, :]
    w_ptrs = weight_ptr + expert * N * D + safe_cols[None, :] * D + depth[:, None]

    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    for start in range(0, D, BLOCK_D):
        if EVEN_D:
            a = tl.load(a_ptrs, mask=is_row[:, None], other=0)
            w = tl.load(w_ptrs)
        else:
            in_depth = depth < D - start
            a = tl.load(a_ptrs, mask=is_row[:, None] & in_depth[None, :], other=0)
            w = tl.load(w_ptrs, mask=in_depth[:, None], other=0)
        sums = tl.dot(a, w, acc=sums, out_dtype=tl.int32)
        a_ptrs += BLOCK_D
        w_ptrs += BLOCK_D

    out_ptrs = out_ptr + pairs[:, None] * N + cols[None, :]
    is_out = is_row[:, None] & (cols < N)[None, :]
    if RAW_SUMS:
        tl.store(out_ptrs, sums, mask=is_out)
    else:
        row_scale = tl.load(row_scale_ptr + pairs, mask=is_row, other=0.0)
        values = _scaled(sums, row_scale, weight_scale_ptr, bias_ptr, expert, 0, cols, N, N, PER_CHANNEL)
        tl.store(out_ptrs, _to_dtype(values, out_ptr.dtype.element_ty, INTERPRETED), mask=is_out)
