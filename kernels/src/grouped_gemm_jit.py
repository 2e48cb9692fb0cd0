# mypy: ignore-errors
"""Jitted code of the grouped products; `grouped_gemm` defines the arithmetic and launches it.

D is the summed dimension (H for gate-up, I for down) and N the output columns (I and H).

A program computes one row block by BLOCK_N columns. The weights are the left operand, [BLOCK_N, BLOCK_D], and the
activations the right one, [BLOCK_D, rows]: the wide matrix instructions of recent GPUs want 64 rows or more on the
left, which weights always have, while they take as few as 8 columns on the right, which is what an expert with few
tokens has.

A row block holds up to BLOCK_M rows, or up to BLOCK_M + TAIL_M: then two accumulators share one pass over the weights.
A block of at most SMALL_M rows runs with that height. The three cases are branches of one kernel, so that neighbouring
programs, which share an expert's weights through the second-level cache, run side by side.
"""

import triton
import triton.language as tl

from .cast_jit import _to_dtype
from .dependent_jit import _trigger, _wait
from .epilogue_jit import _activate, _scaled


@triton.jit
def _tile_of(program, num_row_blocks, num_col_blocks, GROUP_M: tl.constexpr):
    """(row block, column block) of a program: GROUP_M row blocks share a column of weights before the next column."""
    per_group = GROUP_M * num_col_blocks
    first = (program // per_group) * GROUP_M
    height = tl.minimum(num_row_blocks - first, GROUP_M)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def _row_block(block, topk_ids_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr, num_experts):
    """(expert, first row, rows) of a row block, rows 0 for one not in use. Without a plan, block i is pair i."""
    if block_expert_ptr is None:
        expert = tl.load(topk_ids_ptr + block).to(tl.int64)
        first = block
        rows = ((expert >= 0) & (expert < num_experts)).to(tl.int32)
    else:
        # All loads at once, those of blocks beyond the ones in use included.
        in_use = block < tl.load(totals_ptr)
        expert = tl.load(block_expert_ptr + block).to(tl.int64)
        first = tl.load(block_first_ptr + block)
        rows = tl.where(in_use, tl.load(block_rows_ptr + block), 0)
    return expert, first, rows


@triton.jit
def _pairs_of(pairs_ptr, rows):
    pairs = rows if pairs_ptr is None else tl.load(pairs_ptr + rows)
    return pairs.to(tl.int64)


@triton.jit
def _weight_ptrs(weight_ptr, row, cols, num_cols, D, BLOCK_D: tl.constexpr):
    """Pointers to [cols, BLOCK_D] codes of the rows row + cols; those past the end read row 0, which spares a mask."""
    safe = tl.where(cols < num_cols, cols, 0)
    return weight_ptr + (row + safe)[:, None] * D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _row_ptrs(codes_ptr, rows, D, BLOCK_D: tl.constexpr):
    return codes_ptr + rows[:, None] * D + tl.arange(0, BLOCK_D)[None, :]


@triton.jit
def _load(ptrs, start, D, BLOCK_D: tl.constexpr, EVEN_D: tl.constexpr):
    return tl.load(ptrs) if EVEN_D else tl.load(ptrs, mask=(tl.arange(0, BLOCK_D) < D - start)[None, :], other=0)


@triton.jit
def _gate_up_block(
    codes_ptr,
    row_scale_ptr,
    weight_ptr,
    weight_desc,
    weight_scale_ptr,
    bias_ptr,
    router_weight_ptr,
    out_ptr,
    pairs_ptr,
    expert,
    first,
    rows_left,
    col_block,
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
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = expert * (2 * N)
    if weight_desc is None:
        gate_ptrs = _weight_ptrs(weight_ptr, weight_row, cols, N, D, BLOCK_D)
        up_ptrs = gate_ptrs + N * D
    else:
        gate_row = (weight_row + col_block * BLOCK_N).to(tl.int32)

    # Rows past the end of the block repeat its last one; their results are dropped.
    main = tl.arange(0, BLOCK_M)
    main_pairs = _pairs_of(pairs_ptr, first + tl.minimum(main, rows_left - 1))
    main_ptrs = _row_ptrs(codes_ptr, main_pairs // PAIRS_PER_ROW, D, BLOCK_D)
    gate_sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    up_sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    if TAIL_M:
        tail = BLOCK_M + tl.arange(0, TAIL_M)
        tail_pairs = _pairs_of(pairs_ptr, first + tl.minimum(tail, rows_left - 1))
        tail_ptrs = _row_ptrs(codes_ptr, tail_pairs // PAIRS_PER_ROW, D, BLOCK_D)
        tail_gate_sums = tl.zeros([BLOCK_N, TAIL_M], dtype=tl.int32)
        tail_up_sums = tl.zeros([BLOCK_N, TAIL_M], dtype=tl.int32)

    for start in range(0, D, BLOCK_D):
        if weight_desc is None:
            gate_w = _load(gate_ptrs + start, start, D, BLOCK_D, EVEN_D)
            up_w = _load(up_ptrs + start, start, D, BLOCK_D, EVEN_D)
        else:
            gate_w = weight_desc.load([gate_row, start])
            up_w = weight_desc.load([gate_row + N, start])
        x = _load(main_ptrs + start, start, D, BLOCK_D, EVEN_D)
        gate_sums = tl.dot(gate_w, x.T, acc=gate_sums, out_dtype=tl.int32)
        up_sums = tl.dot(up_w, x.T, acc=up_sums, out_dtype=tl.int32)
        if TAIL_M:
            x = _load(tail_ptrs + start, start, D, BLOCK_D, EVEN_D)
            tail_gate_sums = tl.dot(gate_w, x.T, acc=tail_gate_sums, out_dtype=tl.int32)
            tail_up_sums = tl.dot(up_w, x.T, acc=tail_up_sums, out_dtype=tl.int32)

    _store_gate_up(
        gate_sums.T, up_sums.T, main, main_pairs, row_scale_ptr, weight_scale_ptr, bias_ptr, router_weight_ptr, out_ptr,
        expert, first, rows_left, cols, N, limit, alpha, PAIRS_PER_ROW, ACTIVATION, PER_CHANNEL, RAW_SUMS, INTERPRETED,
    )  # fmt: skip
    if TAIL_M:
        _store_gate_up(
            tail_gate_sums.T, tail_up_sums.T, tail, tail_pairs, row_scale_ptr, weight_scale_ptr, bias_ptr,
            router_weight_ptr, out_ptr, expert, first, rows_left, cols, N, limit, alpha, PAIRS_PER_ROW, ACTIVATION,
            PER_CHANNEL, RAW_SUMS, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _store_gate_up(
    gate_sums,
    up_sums,
    rows,
    pairs,
    row_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    router_weight_ptr,
    out_ptr,
    expert,
    first,
    rows_left,
    cols,
    N,
    limit,
    alpha,
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RAW_SUMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    is_out = (rows < rows_left)[:, None] & (cols < N)[None, :]
    out_row = (first + rows).to(tl.int64)
    if RAW_SUMS:
        out_ptrs = out_ptr + out_row[:, None] * (2 * N) + cols[None, :]
        tl.store(out_ptrs, gate_sums, mask=is_out)
        tl.store(out_ptrs + N, up_sums, mask=is_out)
    else:
        row_scale = tl.load(row_scale_ptr + pairs // PAIRS_PER_ROW)
        if router_weight_ptr is not None:
            row_scale *= tl.load(router_weight_ptr + pairs)
        gate = _scaled(gate_sums, row_scale, weight_scale_ptr, bias_ptr, expert, 0, cols, N, 2 * N, PER_CHANNEL)
        up = _scaled(up_sums, row_scale, weight_scale_ptr, bias_ptr, expert, N, cols, N, 2 * N, PER_CHANNEL)
        out = _to_dtype(_activate(gate, up, limit, alpha, ACTIVATION), out_ptr.dtype.element_ty, INTERPRETED)
        tl.store(out_ptr + out_row[:, None] * N + cols[None, :], out, mask=is_out)


@triton.jit(do_not_specialize=["num_row_blocks", "num_experts"])
def grouped_gate_up_kernel(
    codes_ptr,  # i8 [R, D]
    row_scale_ptr,  # f32 [R]
    weight_ptr,  # i8 [E, 2N, D]: N gate rows, then N up rows
    weight_desc,  # descriptor of the same as [E * 2N, D], or None
    weight_scale_ptr,  # f32 [E, 2N] or [E]
    bias_ptr,  # float [E, 2N] or None
    router_weight_ptr,  # f32 [P] or None
    out_ptr,  # float [P, N] in sorted order, or i32 [P, 2N] for RAW_SUMS
    pairs_ptr,  # i32 [P], or None with the rest of the plan: pairs are not sorted
    block_expert_ptr,  # i32 [max_blocks]
    block_first_ptr,  # i32 [max_blocks]
    block_rows_ptr,  # i32 [max_blocks]
    totals_ptr,  # i32 [2]: blocks, rows
    topk_ids_ptr,  # int [P], where the plan's pointers are None
    num_row_blocks,  # the most there can be
    num_experts,
    D,
    N,
    limit,
    alpha,
    PAIRS_PER_ROW: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PER_CHANNEL: tl.constexpr,
    RAW_SUMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row_block, col_block = _tile_of(tl.program_id(0), num_row_blocks, tl.cdiv(N, BLOCK_N), GROUP_M)
    _wait(DEPENDENT)
    _trigger(DEPENDENT)
    expert, first, rows = _row_block(
        row_block, topk_ids_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr, num_experts
    )
    if rows == 0:
        return
    if (SMALL_M > 0) & (rows <= SMALL_M):
        _gate_up_block(
            codes_ptr, row_scale_ptr, weight_ptr, weight_desc, weight_scale_ptr, bias_ptr, router_weight_ptr, out_ptr,
            pairs_ptr, expert, first, rows, col_block, D, N, limit, alpha, PAIRS_PER_ROW, ACTIVATION, PER_CHANNEL,
            RAW_SUMS, INTERPRETED, EVEN_D, SMALL_M if SMALL_M > 0 else BLOCK_M, 0, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif (TAIL_M > 0) & (rows > BLOCK_M):
        _gate_up_block(
            codes_ptr, row_scale_ptr, weight_ptr, weight_desc, weight_scale_ptr, bias_ptr, router_weight_ptr, out_ptr,
            pairs_ptr, expert, first, rows, col_block, D, N, limit, alpha, PAIRS_PER_ROW, ACTIVATION, PER_CHANNEL,
            RAW_SUMS, INTERPRETED, EVEN_D, BLOCK_M, TAIL_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _gate_up_block(
            codes_ptr, row_scale_ptr, weight_ptr, weight_desc, weight_scale_ptr, bias_ptr, router_weight_ptr, out_ptr,
            pairs_ptr, expert, first, rows, col_block, D, N, limit, alpha, PAIRS_PER_ROW, ACTIVATION, PER_CHANNEL,
            RAW_SUMS, INTERPRETED, EVEN_D, BLOCK_M, 0, BLOCK_N, BLOCK_D,
        )  # fmt: skip


@triton.jit
def _down_block(
    codes_ptr,
    codes_desc,
    row_scale_ptr,
    weight_ptr,
    weight_desc,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    pairs_ptr,
    expert,
    first,
    rows_left,
    col_block,
    D,
    N,
    PER_CHANNEL: tl.constexpr,
    RAW_SUMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    if weight_desc is None:
        w_ptrs = _weight_ptrs(weight_ptr, expert * N, cols, N, D, BLOCK_D)
    else:
        w_row = (expert * N + col_block * BLOCK_N).to(tl.int32)

    main = tl.arange(0, BLOCK_M)
    main_ptrs = _row_ptrs(codes_ptr, (first + tl.minimum(main, rows_left - 1)).to(tl.int64), D, BLOCK_D)
    sums = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    if TAIL_M:
        tail = BLOCK_M + tl.arange(0, TAIL_M)
        tail_ptrs = _row_ptrs(codes_ptr, (first + tl.minimum(tail, rows_left - 1)).to(tl.int64), D, BLOCK_D)
        tail_sums = tl.zeros([BLOCK_N, TAIL_M], dtype=tl.int32)

    for start in range(0, D, BLOCK_D):
        if weight_desc is None:
            w = _load(w_ptrs + start, start, D, BLOCK_D, EVEN_D)
        else:
            w = weight_desc.load([w_row, start])
        if codes_desc is None:
            x = _load(main_ptrs + start, start, D, BLOCK_D, EVEN_D)
        else:
            x = codes_desc.load([first, start])
        sums = tl.dot(w, x.T, acc=sums, out_dtype=tl.int32)
        if TAIL_M:
            x = _load(tail_ptrs + start, start, D, BLOCK_D, EVEN_D)
            tail_sums = tl.dot(w, x.T, acc=tail_sums, out_dtype=tl.int32)

    _store_down(
        sums.T, main, row_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, pairs_ptr, expert, first, rows_left, cols, N,
        PER_CHANNEL, RAW_SUMS, INTERPRETED,
    )  # fmt: skip
    if TAIL_M:
        _store_down(
            tail_sums.T, tail, row_scale_ptr, weight_scale_ptr, bias_ptr, out_ptr, pairs_ptr, expert, first, rows_left,
            cols, N, PER_CHANNEL, RAW_SUMS, INTERPRETED,
        )  # fmt: skip


@triton.jit
def _store_down(
    sums,
    rows,
    row_scale_ptr,
    weight_scale_ptr,
    bias_ptr,
    out_ptr,
    pairs_ptr,
    expert,
    first,
    rows_left,
    cols,
    N,
    PER_CHANNEL: tl.constexpr,
    RAW_SUMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
):
    is_row = rows < rows_left
    pairs = _pairs_of(pairs_ptr, first + tl.minimum(rows, rows_left - 1))
    out_ptrs = out_ptr + pairs[:, None] * N + cols[None, :]
    is_out = is_row[:, None] & (cols < N)[None, :]
    if RAW_SUMS:
        tl.store(out_ptrs, sums, mask=is_out)
    else:
        row_scale = tl.load(row_scale_ptr + first + rows, mask=is_row, other=0.0)
        values = _scaled(sums, row_scale, weight_scale_ptr, bias_ptr, expert, 0, cols, N, N, PER_CHANNEL)
        tl.store(out_ptrs, _to_dtype(values, out_ptr.dtype.element_ty, INTERPRETED), mask=is_out)


@triton.jit(do_not_specialize=["num_row_blocks", "num_experts"])
def grouped_down_kernel(
    codes_ptr,  # i8 [P, D], in sorted order
    codes_desc,  # descriptor of the same, or None
    row_scale_ptr,  # f32 [P]
    weight_ptr,  # i8 [E, N, D]
    weight_desc,  # descriptor of the same as [E * N, D], or None
    weight_scale_ptr,  # f32 [E, N] or [E]
    bias_ptr,  # float [E, N] or None
    out_ptr,  # float [P, N] in the order of pairs, or i32 for RAW_SUMS
    pairs_ptr,  # i32 [P], or None with the rest of the plan: pairs are not sorted
    block_expert_ptr,  # i32 [max_blocks]
    block_first_ptr,  # i32 [max_blocks]
    block_rows_ptr,  # i32 [max_blocks]
    totals_ptr,  # i32 [2]: blocks, rows
    topk_ids_ptr,  # int [P], where the plan's pointers are None
    num_row_blocks,  # the most there can be
    num_experts,
    D,
    N,
    PER_CHANNEL: tl.constexpr,
    RAW_SUMS: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    row_block, col_block = _tile_of(tl.program_id(0), num_row_blocks, tl.cdiv(N, BLOCK_N), GROUP_M)
    expert, first, rows = _row_block(
        row_block, topk_ids_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr, num_experts
    )
    _wait(DEPENDENT)
    _trigger(DEPENDENT)
    if rows == 0:
        return
    if (SMALL_M > 0) & (rows <= SMALL_M):
        _down_block(
            codes_ptr, None, row_scale_ptr, weight_ptr, weight_desc, weight_scale_ptr, bias_ptr, out_ptr, pairs_ptr,
            expert, first, rows, col_block, D, N, PER_CHANNEL, RAW_SUMS, INTERPRETED, EVEN_D, SMALL_M if SMALL_M > 0
            else BLOCK_M, 0, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    elif (TAIL_M > 0) & (rows > BLOCK_M):
        _down_block(
            codes_ptr, codes_desc, row_scale_ptr, weight_ptr, weight_desc, weight_scale_ptr, bias_ptr, out_ptr,
            pairs_ptr, expert, first, rows, col_block, D, N, PER_CHANNEL, RAW_SUMS, INTERPRETED, EVEN_D, BLOCK_M,
            TAIL_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _down_block(
            codes_ptr, codes_desc, row_scale_ptr, weight_ptr, weight_desc, weight_scale_ptr, bias_ptr, out_ptr,
            pairs_ptr, expert, first, rows, col_block, D, N, PER_CHANNEL, RAW_SUMS, INTERPRETED, EVEN_D, BLOCK_M, 0,
            BLOCK_N, BLOCK_D,
        )  # fmt: skip
