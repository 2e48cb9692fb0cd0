# mypy: ignore-errors
"""Conversion of float32 results to the dtype of the output."""

import triton
import triton.language as tl


@triton.jit
def _to_dtype(x, DTYPE: tl.constexpr, INTERPRETED: tl.constexpr):
    """float32 `x` rounded to nearest, half to even.

    Compiled code does so by itself. Triton's interpreter truncates to bfloat16 instead; there, the 16 bits that it
    drops are rounded into the others first.
    """
    if INTERPRETED and tl.bfloat16 == DTYPE:
        bits = x.to(tl.int32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(DTYPE)
