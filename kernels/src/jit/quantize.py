# mypy: ignore-errors
"""The quantization; `quantize` defines the arithmetic."""

import triton
import triton.language as tl

from .dependent import _trigger, _wait


@triton.jit
def _magnitude_bits(x):
    """The bits of |x| for float32 x. As integers they order like the magnitudes, with NaN above infinity, so that a
    maximum over them keeps a NaN, which the maximum instructions of GPUs would drop."""
    return x.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _rounded(quotient):
    """Bits of which the lowest byte is rint(quotient), for |quotient| at most 127.5.

    1.5 * 2^23: the spacing of float32 is 1 there, so the addition itself rounds, half to even, on any hardware.
    """
    return (quotient + 12582912.0).to(tl.int32, bitcast=True)


@triton.jit
def _to_codes(x, scale):
    """rint(clamp(x / scale, -127, 127)) as int8, 0 for a NaN quotient; `div_rn` is the IEEE division."""
    quotient = tl.div_rn(x, scale)
    quotient = tl.where(quotient > 127.0, 127.0, tl.where(quotient < -127.0, -127.0, quotient))
    return tl.where(quotient == quotient, _rounded(quotient), 0).to(tl.int8)


@triton.jit
def _to_own_codes(x, scale, STEPS: tl.constexpr):
    """`_to_codes` for scales [rows, 1] that are the rows' own absmax / 127, or NaN where that is not finite.

    The quotient is refined from x * (1 / scale) by fused steps. A first one brings it within one unit in the last
    place; then the remainder x - quotient * scale is exact, and a second gives the correctly rounded quotient, as the
    division would, at a fifth of its instructions (Markstein, IBM J. Res. Dev. 34, 1990). Where the remainder
    underflows, the code is 0 either way. With |x| <= absmax no clamp is needed.

    One step is enough for values of 16 bits: with so few bits in x and absmax, a quotient is near a half only where x
    and absmax are in the ratio of small integers, and there one step rounds as the division does. A test covers every
    pair of mantissas.
    """
    inverse = tl.div_rn(1.0, scale)
    quotient = x * inverse
    for _ in tl.static_range(STEPS):
        quotient = tl.fma(tl.fma(quotient, -scale, x), inverse, quotient)
    return (_rounded(quotient) & tl.where(scale == scale, -1, 0)).to(tl.int8)


@triton.jit
def _quantize_tile(x, scale, INTERPRETED: tl.constexpr, STEPS: tl.constexpr):
    """Codes of x [rows, n] by the scales [rows]; STEPS as in `_to_own_codes`, 0 where scales are not the rows' own."""
    fused: tl.constexpr = STEPS > 0 and not INTERPRETED  # the interpreter's fused product and sum rounds twice
    return _to_own_codes(x, scale[:, None], STEPS) if fused else _to_codes(x, scale[:, None])


@triton.jit
def _load_tile(x_ptrs, start, N, in_use, factor, BLOCK_N: tl.constexpr):
    cols = start + tl.arange(0, BLOCK_N)
    x = tl.load(x_ptrs + cols[None, :], mask=in_use[:, None] & (cols < N)[None, :], other=0.0)
    x = x.to(tl.float32)
    return x if factor is None else x * factor


@triton.jit
def _store_tile(codes_ptr, targets, masks, codes, start, N, BLOCK_N: tl.constexpr):
    cols = start + tl.arange(0, BLOCK_N)
    for i in tl.static_range(len(targets)):
        codes_ptrs = codes_ptr + (targets[i] * N)[:, None] + cols[None, :]
        tl.store(codes_ptrs, codes, mask=masks[i][:, None] & (cols < N)[None, :])


@triton.jit
def _own_scale(absmax, MIN_SCALE: tl.constexpr):
    return tl.maximum(tl.div_rn(absmax, 127.0), MIN_SCALE)


@triton.jit
def _quantize_rows(
    x_ptrs,  # [ROWS, 1]
    codes_ptr,  # int8 [., N]
    scale_ptr,  # f32 [.]
    targets,  # a tuple of i64 [ROWS]: the rows of codes and scales that each row is written to
    masks,  # a tuple of as many masks [ROWS]
    fixed_scale,  # f32 [ROWS] or None: the rows' own
    factor,  # f32 [ROWS, 1] or None, by which rows are multiplied
    in_use,  # [ROWS]
    N,
    MIN_SCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,  # blocks in a row, 0 for too many to hold in registers
):
    largest = tl.zeros([ROWS, BLOCK_N], dtype=tl.int32)
    kept = ()
    if CHUNKS:
        for i in tl.static_range(CHUNKS):
            x = _load_tile(x_ptrs, i * BLOCK_N, N, in_use, factor, BLOCK_N)
            largest = tl.maximum(largest, _magnitude_bits(x))
            kept += (x,)
    else:
        for start in range(0, N, BLOCK_N):
            x = _load_tile(x_ptrs, start, N, in_use, factor, BLOCK_N)
            largest = tl.maximum(largest, _magnitude_bits(x))
    absmax = tl.max(largest, axis=1).to(tl.float32, bitcast=True)

    scale = _own_scale(absmax, MIN_SCALE) if fixed_scale is None else fixed_scale
    scale = tl.where(absmax < float("inf"), scale, float("nan"))
    for i in tl.static_range(len(targets)):
        tl.store(scale_ptr + targets[i], scale, mask=masks[i])

    OF_16_BITS: tl.constexpr = x_ptrs.dtype.element_ty.primitive_bitwidth == 16 and factor is None
    STEPS: tl.constexpr = 0 if fixed_scale is not None else 1 if OF_16_BITS else 2
    if CHUNKS:
        for i in tl.static_range(CHUNKS):
            codes = _quantize_tile(kept[i], scale, INTERPRETED, STEPS)
            _store_tile(codes_ptr, targets, masks, codes, i * BLOCK_N, N, BLOCK_N)
    else:
        for start in range(0, N, BLOCK_N):
            x = _load_tile(x_ptrs, start, N, in_use, factor, BLOCK_N)
            codes = _quantize_tile(x, scale, INTERPRETED, STEPS)
            _store_tile(codes_ptr, targets, masks, codes, start, N, BLOCK_N)


@triton.jit(do_not_specialize=["num_rows", "num_experts"])
def quantize_rows_kernel(
    x_ptr,  # float [R, N], rows row_stride apart
    codes_ptr,  # int8 [P, N]
    scale_ptr,  # f32 [P]
    topk_ids_ptr,  # int [P] or None: rows of other ranks are skipped
    pairs_ptr,  # i32 [P] or None: rows in sorted order, row i for pair pairs[i]
    rows_ptr,  # i32 [P] or None: a row is written for each of its COPIES pairs, to the rows that these have
    totals_ptr,  # i32 [3], with pairs: its second element is the number of rows
    expert_scale_ptr,  # f32 [E] or None: dynamic scales
    router_weight_ptr,  # f32 [P] or None
    row_stride,
    N,
    num_rows,
    num_experts,
    PAIRS_PER_ROW: tl.constexpr,
    COPIES: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    TRIGGER_FIRST: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
):
    """Grid: (row groups,). A program quantizes ROWS rows, each into one output row or COPIES of them."""
    if TRIGGER_FIRST:
        _trigger(DEPENDENT)
    _wait(DEPENDENT)
    if not TRIGGER_FIRST:
        _trigger(DEPENDENT)
    if pairs_ptr is not None:
        num_rows = tl.load(totals_ptr + 1)
    rows = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
    in_use = rows < num_rows
    targets, masks = (), ()
    if rows_ptr is not None:
        for copy in tl.static_range(COPIES):
            expert = tl.load(topk_ids_ptr + rows * COPIES + copy, mask=in_use, other=-1)
            here = (expert >= 0) & (expert < num_experts)
            targets += (tl.load(rows_ptr + rows * COPIES + copy, mask=here, other=0).to(tl.int64),)
            masks += (here,)
    else:
        if topk_ids_ptr is not None:
            if pairs_ptr is None:
                expert = tl.load(topk_ids_ptr + rows, mask=in_use, other=-1)
                in_use = (expert >= 0) & (expert < num_experts)
            elif expert_scale_ptr is not None:
                expert = tl.load(topk_ids_ptr + tl.load(pairs_ptr + rows, mask=in_use, other=0), mask=in_use, other=0)
        targets += (rows,)
        masks += (in_use,)
    x_ptrs = x_ptr + ((rows // PAIRS_PER_ROW) * row_stride)[:, None]
    factor = None
    if router_weight_ptr is not None:
        factor = tl.load(router_weight_ptr + rows, mask=in_use, other=0.0)[:, None]

    fixed_scale = None
    if expert_scale_ptr is not None:
        fixed_scale = tl.load(expert_scale_ptr + expert, mask=in_use, other=1.0)
    _quantize_rows(
        x_ptrs, codes_ptr, scale_ptr, targets, masks, fixed_scale, factor, in_use, N, MIN_SCALE, INTERPRETED, ROWS,
        BLOCK_N, CHUNKS,
    )  # fmt: skip


@triton.jit
def absmax_kernel(
    x_ptr,  # float [numel]
    partial_ptr,  # f32 [programs]
    numel,
    BLOCK: tl.constexpr,
):
    """Grid: (at most 1024,). A program computes the largest finite magnitude of every num_programs-th block."""
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
        offsets = start + tl.arange(0, BLOCK)
        magnitude = tl.abs(tl.load(x_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32))
        largest = tl.maximum(largest, tl.where(magnitude < float("inf"), magnitude, 0.0))
    tl.store(partial_ptr + tl.program_id(0), tl.max(largest, axis=0))


@triton.jit
def tensor_scale_kernel(
    partial_ptr,  # f32 [count]
    scale_ptr,  # f32 [1]
    count,
    MIN_SCALE: tl.constexpr,
    BLOCK: tl.constexpr,  # at least count
):
    """Grid: (1,). The program reduces the partial maxima to the scale of the tensor."""
    offsets = tl.arange(0, BLOCK)
    absmax = tl.max(tl.load(partial_ptr + offsets, mask=offsets < count, other=0.0), axis=0)
    tl.store(scale_ptr, tl.maximum(tl.div_rn(absmax, 127.0), MIN_SCALE))


@triton.jit
def quantize_flat_kernel(
    x_ptr,  # float [numel]
    codes_ptr,  # int8 [numel]
    scale_ptr,  # f32 [1]
    numel,
    BLOCK: tl.constexpr,
):
    """Grid: (blocks,). A program quantizes BLOCK elements by one scale."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
    tl.store(codes_ptr + offsets, _to_codes(x, tl.load(scale_ptr)), mask=offsets < numel)
