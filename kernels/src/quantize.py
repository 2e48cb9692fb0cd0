"""Symmetric int8 quantization of activations.

For a row x (of bfloat16, float16 or float32 values, widened to float32, which is exact):

    scale = max(absmax / 127, 2^-100)
    code  = rint(clamp(x / scale, -127, 127))          rint: to nearest, ties to even

Both divisions are IEEE float32 divisions, so the codes and scales are the same bits on every device and in the torch
twins. 127 and not 128 keeps the codes symmetric. The floor of 2^-100 gives a row of zeros a positive scale, and keeps
the product of two scales a normal float32.

Where every row has a scale of its own, a row that holds a NaN or an infinity gets codes 0 and scale NaN: what is
computed from it is NaN, as it would be unquantized, and no other row sees it. A scale that serves several rows (per
tensor) cannot carry a NaN without affecting the others, so there the absmax is that of the finite values, infinities
saturate to +-127 and NaN becomes 0.
"""

from typing import Literal

import torch

from .backend import device_guard, uses_triton
from .launch.quantize import launch_tensor_scale, quantize_flat, quantize_rows, quantize_tensor_reference

Granularity = Literal["per_token", "per_tensor"]

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def quantize_int8(
    x: torch.Tensor, *, granularity: Granularity = "per_token", scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize `x` [..., N] (bfloat16, float16 or float32) to int8 codes in [-127, 127].

    granularity "per_token" gives every row along the last dimension its own scale; "per_tensor" gives one scale to
    the whole tensor, computed from it or, when `scale` (float32, one positive element) is given, taken as it is.

    Returns (codes int8 [..., N], scales float32): scales are [..., 1] per token and [1] per tensor. `codes * scales`
    dequantizes. The module's docstring defines the arithmetic and what NaN and infinities give.

    Raises TypeError for a wrong dtype and ValueError for a wrong granularity, shape or device.
    """
    _check(x, granularity, scale)
    if not uses_triton(x.device) or x.numel() == 0:
        return quantize_tensor_reference(x, granularity, scale)
    flat = x.contiguous()
    with device_guard(x.device):
        if granularity == "per_token":
            codes, scales = quantize_rows(flat.view(-1, x.shape[-1]))
            return codes.view(x.shape), scales.view(*x.shape[:-1], 1)
        tensor_scale = launch_tensor_scale(flat) if scale is None else scale.reshape(1)
        return quantize_flat(flat, tensor_scale), tensor_scale


def quantize_int8_reference(
    x: torch.Tensor, *, granularity: Granularity = "per_token", scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch twin of `quantize_int8`, equal to it bit for bit, on any device."""
    _check(x, granularity, scale)
    return quantize_tensor_reference(x, granularity, scale)


def _check(x: torch.Tensor, granularity: str, scale: torch.Tensor | None) -> None:
    if x.dtype not in _FLOAT_DTYPES:
        raise TypeError(f"x: expected bfloat16, float16 or float32, found {x.dtype}")
    if x.dim() == 0:
        raise ValueError("x: expected at least one dimension, found a scalar")
    if granularity not in ("per_token", "per_tensor"):
        raise ValueError(f"granularity: expected 'per_token' or 'per_tensor', found {granularity!r}")
    if scale is None:
        return
    if granularity != "per_tensor":
        raise ValueError("scale: expected None for granularity 'per_token'; a given scale needs 'per_tensor'")
    if scale.dtype != torch.float32:
        raise TypeError(f"scale: expected float32, found {scale.dtype}")
    if scale.numel() != 1:
        raise ValueError(f"scale: expected one element, found shape {tuple(scale.shape)}")
    if scale.device != x.device:
        raise ValueError(f"scale: expected device {x.device} of x, found {scale.device}")
