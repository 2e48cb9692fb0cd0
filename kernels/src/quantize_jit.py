# mypy: ignore-errors
"""Jitted code of the quantization; `quantize` defines the arithmetic and launches it."""

import triton
import triton.language as tl


@triton.jit
def _magnitude(x):
    """|x|, infinite for a NaN: the maximum reductions of GPUs drop NaNs, which must not go unseen."""
    return tl.where(x == x, tl.abs(x), float("inf"))


@triton.jit
def _to_codes(x, scale):
    """rint(clamp(x / scale, -127, 127)) as int8, 0 for a NaN quotient; `div_rn` is the IEEE division."""
    quotient = tl.div_rn(x, scale)
    quotient = tl.where(quotient > 127.0, 127.0, tl.where(quotient < -127.0, -127.0, quotient))
    quotient = tl.where(quotient == quotient, quotient, 0.0)
    # 1.5 * 2^23: the spacing of float32 is 1 there, so the addition itself rounds, half to even, on any hardware.
    return ((quotient + 12582912.0) - 12582912.0).to(tl.int8)


@triton.jit(do_not_specialize=["num_experts"])
def quantize_rows_kernel(
    x_ptr,  # float [R, N], rows row_stride apart
    codes_ptr,  # int8 [P, N]
    scale_ptr,  # f32 [P]
    topk_ids_ptr,  # int [P] or None: rows of other ranks are skipped
    expert_scale_ptr,  # f32 [E] or None: dynamic scales
    router_weight_ptr,  # f32 [P] or None
    row_stride,
    N,
    num_experts,
    PAIRS_PER_ROW: tl.constexpr,
    MIN_SCALE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ONE_BLOCK: tl.constexpr,  # the row fits one block and is read once
):
    pair = tl.program_id(0).to(tl.int64)
    if topk_ids_ptr is not None:
        expert = tl.load(topk_ids_ptr + pair)
        if (expert < 0) | (expert >= num_experts):
            return
    x_ptr += (pair // PAIRS_PER_ROW) * row_stride
    codes_ptr += pair * N
    factor = 1.0
    if router_weight_ptr is not None:
        factor = tl.load(router_weight_ptr + pair)
    cols = tl.arange(0, BLOCK_N)

    if ONE_BLOCK:
        x = tl.load(x_ptr + cols, mask=cols < N, other=0.0).to(tl.float32) * factor
        absmax = tl.max(_magnitude(x), axis=0)
    else:
        largest = tl.zeros([BLOCK_N], dtype=tl.float32)
        for start in range(0, N, BLOCK_N):
            x = tl.load(x_ptr + start + cols, mask=start + cols < N, other=0.0).to(tl.float32) * factor
            largest = tl.maximum(largest, _magnitude(x))
        absmax = tl.max(largest, axis=0)

    if expert_scale_ptr is not None:
        scale = tl.load(expert_scale_ptr + expert)
    else:
        scale = tl.maximum(tl.div_rn(absmax, 127.0), MIN_SCALE)
    scale = tl.where(absmax < float("inf"), scale, float("nan"))
    tl.store(scale_ptr + pair, scale)

    if ONE_BLOCK:
        tl.store(codes_ptr + cols, _to_codes(x, scale), mask=cols < N)
    else:
        for start in range(0, N, BLOCK_N):
            x = tl.load(x_ptr + start + cols, mask=start + cols < N, other=0.0).to(tl.float32) * factor
            tl.store(codes_ptr + start + cols, _to_codes(x, scale), mask=start + cols < N)


@triton.jit
def absmax_kernel(
    x_ptr,  # float [numel]
    partial_ptr,  # f32 [programs]
    numel,
    BLOCK: tl.constexpr,
):
    """Largest finite magnitude among every num_programs-th block, one result a program."""
    largest = tl.zeros([BLOCK], dtype=tl.float32)
    step = tl.num_programs(0).to(tl.int64) * BLOCK
    for start in range(tl.program_id(0).to(tl.int64) * BLOCK, numel, step):
        offsets = start + tl.arange(0, BLOCK)
        magnitude = _magnitude(tl.load(x_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32))
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
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < numel, other=0.0).to(tl.float32)
    tl.store(codes_ptr + offsets, _to_codes(x, tl.load(scale_ptr)), mask=offsets < numel)
