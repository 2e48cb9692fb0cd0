# mypy: ignore-errors
"""The reduction over a token's experts; `launch.combine` defines the arithmetic."""

import triton
import triton.language as tl

from .cast import _to_dtype
from .dependent import _trigger, _wait


@triton.jit(do_not_specialize=["num_experts"])
def combine_kernel(
    expert_out_ptr,  # float [P, H]
    topk_weights_ptr,  # f32 [P] or None
    topk_ids_ptr,  # int [P]
    out_ptr,  # float [M, H]
    H,
    num_experts,
    TOP_K: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    """Grid: (tokens, column blocks). A program sums the experts of one token in BLOCK_H columns."""
    _wait(DEPENDENT)
    _trigger(DEPENDENT)
    token = tl.program_id(0).to(tl.int64)
    cols = tl.program_id(1) * BLOCK_H + tl.arange(0, BLOCK_H)
    total = tl.zeros([BLOCK_H], dtype=tl.float32)
    # Unrolled, so that the loads of all slots are in flight together.
    for slot in tl.static_range(TOP_K):
        pair = token * TOP_K + slot
        expert = tl.load(topk_ids_ptr + pair)
        here = (expert >= 0) & (expert < num_experts)
        # Triton 3.9's interpreter takes a truth value of one element for an integer, which is no mask.
        mask = (cols < tl.where(here, H, 0)) if INTERPRETED else ((cols < H) & here)
        value = tl.load(expert_out_ptr + pair * H + cols, mask=mask, other=0.0).to(tl.float32)
        if topk_weights_ptr is None:
            total += value
        else:
            weight = tl.load(topk_weights_ptr + pair, mask=here, other=0.0)
            total = tl.fma(value, weight + tl.zeros_like(value), total)
    result = _to_dtype(total, out_ptr.dtype.element_ty, INTERPRETED)
    tl.store(out_ptr + token * H + cols, result, mask=cols < H)
