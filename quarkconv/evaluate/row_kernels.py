# mypy: ignore-errors
"""Triton kernels that read rows of logits, and write a few numbers for each; ``rows`` launches them."""

import triton
import triton.language as tl


@triton.jit
def row_statistics_kernel(logits_ptr, log_sum_ptr, top_ptr, V, BLOCK: tl.constexpr):
    """Grid [n]: a program reads one row. log(sum(exp)) in float64, and the first place of the largest logit.

    Four logits of a lane at a time: exponentials take as long as reading, and the sum before takes one for all four.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    largest = tl.full([BLOCK], float("-inf"), tl.float32)
    sums = tl.zeros([BLOCK], tl.float32)
    places = tl.zeros([BLOCK], tl.int32)
    for start in range(0, V, 4 * BLOCK):
        before = largest
        logits = ()
        for part in tl.static_range(4):
            at = start + part * BLOCK + lanes
            x = tl.load(logits_ptr + row * V + at, at < V, float("-inf")).to(tl.float32)
            places = tl.where(x > largest, at, places)
            largest = tl.maximum(largest, x)
            logits += (x,)
        base = tl.where(largest == float("-inf"), 0.0, largest)
        sums = sums * tl.exp(before - base)
        for part in tl.static_range(4):
            sums += tl.exp(logits[part] - base)
    top = tl.max(largest, 0)
    total = tl.sum(sums * tl.exp(largest - top), 0)
    tl.store(log_sum_ptr + row, top.to(tl.float64) + tl.log(total.to(tl.float64)))
    tl.store(top_ptr + row, tl.min(tl.where(largest == top, places, V), 0))


@triton.jit
def row_divergence_kernel(
    p_ptr, p_log_sum_ptr, q_ptr, q_log_sum_ptr, out_ptr, V, WIDE: tl.constexpr, BLOCK: tl.constexpr
):
    """Grid [n]: a program reads one row of each. Sum of P (log P - log Q); P = 0 adds nothing.

    ``log P - log Q = (p - q) - (their log sums' difference)``: of 16-bit logits, ``p - q`` is exact in float32 unless
    one is 2^16 times the other, and what is rounded after it is as small as the result. WIDE is float64 for others.
    """
    row = tl.program_id(0).to(tl.int64)
    lanes = tl.arange(0, BLOCK)
    p_log_sum, q_log_sum = tl.load(p_log_sum_ptr + row), tl.load(q_log_sum_ptr + row)
    between = (p_log_sum - q_log_sum).to(WIDE)
    p_log_sum = p_log_sum.to(WIDE)
    sums = tl.zeros([BLOCK], WIDE)
    for start in range(0, V, BLOCK):
        at = start + lanes
        p = tl.load(p_ptr + row * V + at, at < V, float("-inf")).to(WIDE)
        q = tl.load(q_ptr + row * V + at, at < V, float("-inf")).to(WIDE)
        probability = tl.exp((p - p_log_sum).to(tl.float32)).to(WIDE)
        sums += tl.where(probability > 0, probability * ((p - q) - between), 0.0)
    tl.store(out_ptr + row, tl.sum(sums.to(tl.float64), 0))
