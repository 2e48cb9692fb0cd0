# mypy: ignore-errors
"""The portable grouped GEMM; `launch.grouped_gemm` defines the arithmetic.

D is the summed dimension (H for gate-up, I for down) and N the output columns (I and H). One kernel serves both.
SORTED, for the first product, results stay in sorted order; otherwise they return to the order of pairs. GATED, weights
have N gate rows and N up rows. Rows are gathered by token, or are in sorted order already.

The weights are the left operand, [BLOCK_N, BLOCK_D], and the activations the right one, [BLOCK_D, rows]: wgmma needs
64 rows on the left, which weights always have, and takes as few as 8 columns on the right, which suits an expert with
few tokens.

A row block holds up to BLOCK_M rows, or up to BLOCK_M + TAIL_M: then two accumulators share one pass over the weights.
A block of at most SMALL_M rows runs with that height. The three cases are branches of one kernel, so that neighbouring
programs, which share an expert's weights in L2, run at the same time.

Values that belong together travel as tuples:

    codes    (pointer, descriptor or None, row scales)
    weights  (pointer, descriptor or None, scales, biases or None)
    result   (pointer, pairs, router weights or None)
    block    (expert, first row, rows, column block)
    sizes    (D, N)
    limits   (limit, alpha) of the activation
"""

import triton
import triton.language as tl

from .cast import _to_dtype
from .dependent import _trigger, _wait
from .epilogue import _activate, _scaled


@triton.jit
def _tile_of(program, num_row_blocks, num_col_blocks, GROUP_M: tl.constexpr):
    """(row block, column block) of a program: GROUP_M row blocks share a column of weights before the next column."""
    per_group = GROUP_M * num_col_blocks
    first = (program // per_group) * GROUP_M
    height = tl.minimum(num_row_blocks - first, GROUP_M)
    within = program % per_group
    return first + within % height, within // height


@triton.jit
def _row_block(block, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr):
    """(expert, first row, rows) of a row block, rows 0 for one not in use. All loads at once, whether in use or not."""
    in_use = block < tl.load(totals_ptr)
    expert = tl.load(block_expert_ptr + block).to(tl.int64)
    first = tl.load(block_first_ptr + block)
    rows = tl.where(in_use, tl.load(block_rows_ptr + block), 0)
    return expert, first, rows


@triton.jit
def _rows_of(rows, first, rows_left, pairs_ptr, PAIRS_PER_ROW: tl.constexpr, SORTED: tl.constexpr):
    """(rows of the codes, rows of the result) for the `rows` of a block; those past its end repeat its last one."""
    row = (first + tl.minimum(rows, rows_left - 1)).to(tl.int64)
    pairs = tl.load(pairs_ptr + row).to(tl.int64)
    source = pairs // PAIRS_PER_ROW if PAIRS_PER_ROW else row
    target = row if SORTED else pairs
    return source, target


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
def _sums(
    codes, weights, weight_row, block, main_rows, tail_rows, cols, sizes,
    GATED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr, TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Sums of the main rows and, for TAIL_M, of the tail's, over one pass of the weights: (main, main of the up half,
    tail, tail of the up half), each [BLOCK_N, rows]; where there is no tail or up half, main again."""
    codes_ptr, codes_desc, row_scale_ptr = codes
    weight_ptr, weight_desc, weight_scale_ptr, bias_ptr = weights
    expert, first, rows_left, col_block = block
    D, N = sizes
    if weight_desc is None:
        w_ptrs = _weight_ptrs(weight_ptr, weight_row, cols, N, D, BLOCK_D)
    else:
        desc_row = (weight_row + col_block * BLOCK_N).to(tl.int32)
    main_ptrs = _row_ptrs(codes_ptr, main_rows, D, BLOCK_D)
    main = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    if GATED:
        main_up = tl.zeros([BLOCK_N, BLOCK_M], dtype=tl.int32)
    if TAIL_M:
        tail_ptrs = _row_ptrs(codes_ptr, tail_rows, D, BLOCK_D)
        tail = tl.zeros([BLOCK_N, TAIL_M], dtype=tl.int32)
        if GATED:
            tail_up = tl.zeros([BLOCK_N, TAIL_M], dtype=tl.int32)

    for start in range(0, D, BLOCK_D):
        if weight_desc is None:
            w = _load(w_ptrs + start, start, D, BLOCK_D, EVEN_D)
            if GATED:
                up_w = _load(w_ptrs + N * D + start, start, D, BLOCK_D, EVEN_D)
        else:
            w = weight_desc.load([desc_row, start])
            if GATED:
                up_w = weight_desc.load([desc_row + N, start])
        if codes_desc is None:
            x = _load(main_ptrs + start, start, D, BLOCK_D, EVEN_D)
        else:
            x = codes_desc.load([first, start])
        main = tl.dot(w, x.T, acc=main, out_dtype=tl.int32)
        if GATED:
            main_up = tl.dot(up_w, x.T, acc=main_up, out_dtype=tl.int32)
        if TAIL_M:
            x = _load(tail_ptrs + start, start, D, BLOCK_D, EVEN_D)
            tail = tl.dot(w, x.T, acc=tail, out_dtype=tl.int32)
            if GATED:
                tail_up = tl.dot(up_w, x.T, acc=tail_up, out_dtype=tl.int32)

    return (
        main,
        main_up if GATED else main,
        tail if TAIL_M else main,
        (tail_up if GATED else tail) if TAIL_M else main,
    )


@triton.jit
def _store(
    sums,  # i32 [rows, cols]
    up_sums,  # the same of the up half, for GATED
    is_row, source, target, codes, weights, result, expert, cols, sizes, limits,
    ACTIVATION: tl.constexpr, PER_CHANNEL: tl.constexpr, RAW_SUMS: tl.constexpr, INTERPRETED: tl.constexpr,
    GATED: tl.constexpr,
):  # fmt: skip
    """Scale, activate and store: source rows of the codes, target rows of the result."""
    codes_ptr, codes_desc, row_scale_ptr = codes
    weight_ptr, weight_desc, weight_scale_ptr, bias_ptr = weights
    out_ptr, pairs_ptr, router_weight_ptr = result
    D, N = sizes
    is_out = is_row[:, None] & (cols < N)[None, :]
    total_cols = 2 * N if GATED else N
    if RAW_SUMS:
        out_ptrs = out_ptr + target[:, None] * total_cols + cols[None, :]
        tl.store(out_ptrs, sums, mask=is_out)
        if GATED:
            tl.store(out_ptrs + N, up_sums, mask=is_out)
    else:
        row_scale = tl.load(row_scale_ptr + source, mask=is_row, other=0.0)
        if router_weight_ptr is not None:
            row_scale *= tl.load(router_weight_ptr + tl.load(pairs_ptr + target))
        out = _scaled(sums, row_scale, weight_scale_ptr, bias_ptr, expert, 0, cols, N, total_cols, PER_CHANNEL)
        if GATED:
            up = _scaled(up_sums, row_scale, weight_scale_ptr, bias_ptr, expert, N, cols, N, total_cols, PER_CHANNEL)
            limit, alpha = limits
            out = _activate(out, up, limit, alpha, ACTIVATION)
        elif ACTIVATION != "":
            limit, alpha = limits
            out = _activate(None, out, limit, alpha, ACTIVATION)
        out_ptrs = out_ptr + target[:, None] * N + cols[None, :]
        tl.store(out_ptrs, _to_dtype(out, out_ptr.dtype.element_ty, INTERPRETED), mask=is_out)


@triton.jit
def _block(
    codes, weights, result, block, sizes, limits,
    PAIRS_PER_ROW: tl.constexpr, ACTIVATION: tl.constexpr, PER_CHANNEL: tl.constexpr, RAW_SUMS: tl.constexpr,
    INTERPRETED: tl.constexpr, GATED: tl.constexpr, SORTED: tl.constexpr, EVEN_D: tl.constexpr, BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One row block by BLOCK_N columns, at the height BLOCK_M + TAIL_M."""
    expert, first, rows_left, col_block = block
    out_ptr, pairs_ptr, router_weight_ptr = result
    D, N = sizes
    cols = col_block * BLOCK_N + tl.arange(0, BLOCK_N)
    weight_row = expert * (2 * N if GATED else N)
    main = tl.arange(0, BLOCK_M)
    source, target = _rows_of(main, first, rows_left, pairs_ptr, PAIRS_PER_ROW, SORTED)
    tail = BLOCK_M + tl.arange(0, TAIL_M if TAIL_M else BLOCK_M)
    tail_source, tail_target = source, target
    if TAIL_M:
        tail_source, tail_target = _rows_of(tail, first, rows_left, pairs_ptr, PAIRS_PER_ROW, SORTED)
    sums, up_sums, tail_sums, tail_up_sums = _sums(
        codes, weights, weight_row, block, source, tail_source, cols, sizes, GATED, EVEN_D, BLOCK_M, TAIL_M, BLOCK_N,
        BLOCK_D,
    )  # fmt: skip
    _store(
        sums.T, up_sums.T, main < rows_left, source, target, codes, weights, result, expert, cols, sizes, limits,
        ACTIVATION, PER_CHANNEL, RAW_SUMS, INTERPRETED, GATED,
    )  # fmt: skip
    if TAIL_M:
        _store(
            tail_sums.T, tail_up_sums.T, tail < rows_left, tail_source, tail_target, codes, weights, result, expert,
            cols, sizes, limits, ACTIVATION, PER_CHANNEL, RAW_SUMS, INTERPRETED, GATED,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_row_blocks"])
def grouped_product_kernel(
    codes_ptr,  # i8 [R, D]: row p // PAIRS_PER_ROW is that of pair p; where that is 0, rows are in sorted order
    codes_desc,  # descriptor of the same for rows in sorted order, or None
    row_scale_ptr,  # f32 [R]
    weight_ptr,  # i8 [E, N, D]; for GATED [E, 2N, D]: N gate rows, then N up rows
    weight_desc,  # descriptor of the same as [E * N, D] or [E * 2N, D], or None
    weight_scale_ptr,  # f32 [E, N], [E, 2N] or [E]
    bias_ptr,  # float [E, N] or [E, 2N], or None
    router_weight_ptr,  # f32 [P] or None; for SORTED
    out_ptr,  # float [P, N], in sorted order or in that of pairs; for RAW_SUMS i32 [P, N], for GATED [P, 2N]
    pairs_ptr,  # i32 [P]
    block_expert_ptr,  # i32 [max_blocks]
    block_first_ptr,  # i32 [max_blocks]
    block_rows_ptr,  # i32 [max_blocks]
    totals_ptr,  # i32 [3]: blocks, rows
    num_row_blocks,  # the most there can be
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
    GATED: tl.constexpr,
    SORTED: tl.constexpr,
    EVEN_D: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    SMALL_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_M: tl.constexpr,
):
    """Grid: (row blocks * column tiles,). A program computes one row block by BLOCK_N columns of the result, of gate
    and up for GATED."""
    row_block, col_block = _tile_of(tl.program_id(0), num_row_blocks, tl.cdiv(N, BLOCK_N), GROUP_M)
    if SORTED:  # right after the routing
        _wait(DEPENDENT)
        _trigger(DEPENDENT)
    expert, first, rows = _row_block(row_block, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr)
    if not SORTED:
        _wait(DEPENDENT)
        _trigger(DEPENDENT)
    if rows == 0:
        return
    weights = (weight_ptr, weight_desc, weight_scale_ptr, bias_ptr)
    result = (out_ptr, pairs_ptr, router_weight_ptr)
    block, sizes, limits = (expert, first, rows, col_block), (D, N), (limit, alpha)
    if (SMALL_M > 0) & (rows <= SMALL_M):
        _block(
            (codes_ptr, None, row_scale_ptr), weights, result, block, sizes, limits, PAIRS_PER_ROW, ACTIVATION,
            PER_CHANNEL, RAW_SUMS, INTERPRETED, GATED, SORTED, EVEN_D, SMALL_M if SMALL_M > 0 else BLOCK_M, 0, BLOCK_N,
            BLOCK_D,
        )  # fmt: skip
    elif (TAIL_M > 0) & (rows > BLOCK_M):
        _block(
            (codes_ptr, codes_desc, row_scale_ptr), weights, result, block, sizes, limits, PAIRS_PER_ROW, ACTIVATION,
            PER_CHANNEL, RAW_SUMS, INTERPRETED, GATED, SORTED, EVEN_D, BLOCK_M, TAIL_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    else:
        _block(
            (codes_ptr, codes_desc, row_scale_ptr), weights, result, block, sizes, limits, PAIRS_PER_ROW, ACTIVATION,
            PER_CHANNEL, RAW_SUMS, INTERPRETED, GATED, SORTED, EVEN_D, BLOCK_M, 0, BLOCK_N, BLOCK_D,
        )  # fmt: skip
