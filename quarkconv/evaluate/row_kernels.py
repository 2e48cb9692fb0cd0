# mypy: ignore-errors
"""Triton kernels that read rows of logits, and write a few numbers for each; ``rows`` launches them."""

import triton
import triton.language as tl


@triton.jit
def row_statistics_kernel(logits_ptr, log_sum_ptr, top_ptr, V, BLOCK: tl.constexpr):
    """Grid [n]: a program reads one row. log(sum(exp)) in float64, and the first place of the largest logit."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    places = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, BLOCK):
        at = start + lanes
        x = tl.load(logits_ptr + row * V + at, at < V, float("-inf")).to(tl.float32)
        places = tl.where(x > largest, at, places)
        new = tl.maximum(largest, x)
        base = tl.where(new == float("-inf"), 0.0, new)
        sums = sums * tl.exp(largest - base) + tl.exp(x - base)
        largest = new
    top = tl.max(largest, 0)
    total = tl.sum(sums * tl.exp(largest - top), 0)
    tl.store(log_sum_ptr + row, top.to(tl.float64) + tl.log(total.to(tl.float64)))
    tl.store(top_ptr + row, tl.min(tl.where(largest == top, places, V), 0))


@triton.jit
def row_divergence_kernel(p_ptr, p_log_sum_ptr, q_ptr, q_log_sum_ptr, out_ptr, V, BLOCK: tl.constexpr):
    """Grid [n]: a program reads one row of each. Sum of P (log P - log Q) in float64; P = 0 adds nothing."""
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    p_log_sum, q_log_sum = tl.load(p_log_sum_ptr + row), tl.load(q_log_sum_ptr + row)
    sums = tl.zeros([BLOCK], tl.float64)
    for start in range(0, V, BLOCK):
        at = start + lanes
        p = tl.load(p_ptr + row * V + at, at < V, float("-inf")).to(tl.float64) - p_log_sum
        q = tl.load(q_ptr + row * V + at, at < V, float("-inf")).to(tl.float64) - q_log_sum
        probability = tl.exp(p.to(tl.float32)).to(tl.float64)
        sums += tl.where(probability > 0, probability * (p - q), 0.0)
    tl.store(out_ptr + row, tl.sum(sums, 0))
