# mypy: ignore-errors
"""Epilogues of the products: scales, bias and activation, in float32.

Where a product is added to something, the fused form is spelled out, so that every kernel that shares these functions
rounds the same way, whatever its compiler would contract.
"""

import triton
import triton.language as tl


@triton.jit
def _sigmoid(x):
    """1 / (1 + exp(-x)), written with exp(-|x|) so that nothing overflows."""
    e = tl.exp(-tl.abs(x))
    return tl.where(x >= 0, 1.0, e) / (1.0 + e)


@triton.jit
def _clamp_max(x, limit):
    return tl.where(x > limit, limit, x)  # unlike a hardware minimum, keeps a NaN


@triton.jit
def _tanh(x):
    """tanh(x) from exp(-2|x|): nothing overflows; near 0 the error is 2^-24 of 1, not of the result."""
    e = tl.exp(-2.0 * tl.abs(x))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x >= 0, t, -t)


@triton.jit
def _activate(gate, up, limit, alpha, ACTIVATION: tl.constexpr):
    """The formulas of `activations`, in float32; `gate` is not read where there is none."""
    if ACTIVATION == "silu":
        out = gate * _sigmoid(gate) * up
    elif ACTIVATION == "relu2":
        out = tl.where(up < 0, 0.0, up)  # keeps a NaN
        out = out * out
    elif ACTIVATION == "gelu":
        out = 0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)) * up
    elif ACTIVATION == "situ":
        out = alpha * _tanh(gate / alpha) * _sigmoid(gate) * up
    elif ACTIVATION == "situ_limited":
        out = alpha * _tanh(gate / alpha) * _sigmoid(gate) * (limit * _tanh(up / limit))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(z)) / 2 = sigmoid(2 z): no tanh needed, and no cancellation in the negative tail.
        z = 0.7978845608028654 * gate * (1.0 + 0.044715 * gate * gate)
        out = gate * _sigmoid(2.0 * z) * up
    else:
        up = -_clamp_max(-_clamp_max(up, limit), limit)
        if ACTIVATION == "swiglustep":
            out = _clamp_max(gate * _sigmoid(gate), limit) * up
        elif ACTIVATION == "silu_limited":
            gate = _clamp_max(gate, limit)
            out = gate * _sigmoid(gate) * up
        else:
            tl.static_assert(ACTIVATION == "swigluoai")
            gate = _clamp_max(gate, limit)
            out = gate * _sigmoid(alpha * gate) * (up + 1.0)
    return out


@triton.jit
def _dequantized(sums, row_scale, scale, bias):
    """sums * row_scale * scale + bias, the last two as wide as sums or broadcast to it; bias may be None.

    One scale after the other: the product of the two scales could leave float32's range where the result does not.
    """
    values = sums.to(tl.float32) * row_scale
    if bias is None:
        values = values * scale
    else:
        zeros = tl.zeros_like(values)
        values = tl.fma(values, scale + zeros, bias.to(tl.float32) + zeros)
    return values


@triton.jit
def _scaled(sums, row_scale, scale_ptr, bias_ptr, expert, first, cols, num_cols, total_cols, PER_CHANNEL: tl.constexpr):
    """sums * row_scale * weight scale + bias; columns first + cols of the total_cols of this expert."""
    in_range = cols < num_cols
    if PER_CHANNEL:
        scale = tl.load(scale_ptr + expert * total_cols + first + cols, mask=in_range, other=0.0)[None, :]
    else:
        scale = tl.load(scale_ptr + expert)
    bias = None
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + expert * total_cols + first + cols, mask=in_range, other=0.0)[None, :]
    return _dequantized(sums, row_scale[:, None], scale, bias)
