"""Symmetric int8 quantization of activations.

For a row x (of bfloat16, float16 or float32 values, widened to float32, which is exact):

    scale = max(absmax / 127, 2^-100)
    code  = rint(clamp(x / scale, -127, 127))          rint: to nearest, ties to even

Both divisions are IEEE float32 divisions, so the codes and scales are the same bits on every device and in the torch
twins. 127 and not 128 keeps the codes symmetric. The floor of 2^-100 gives a row of zeros a positive scale, and keeps
the product of two scales a normal float32.

Where every row has a scale of its own, a row that holds a NaN or an infinity gets codes 0 and scale NaN: what is
computed from it is NaN, as it would be unquantized, and no other row sees it. A scale that serves several rows (per
tensor) cannot say that without spoiling the others, so there the absmax is that of the finite values, infinities
saturate to +-127 and NaN becomes 0.
"""

from typing import TYPE_CHECKING, Any, Literal

import torch

from .backend import dependence, device_guard, interpreting, uses_triton
from .options import choose_row_options

if TYPE_CHECKING:
    from .routing import RoutingPlan

Granularity = Literal["per_token", "per_tensor"]

CODE_MAX = 127.0
MIN_SCALE = 2.0**-100

_FLOAT_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
_FLAT_BLOCK = 4096
_MAX_PARTIALS = 1024
_MAX_UNROLLED = 16


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
        return _quantize_torch(x, granularity, scale)
    flat = x.contiguous()
    with device_guard(x.device):
        if granularity == "per_token":
            codes, scales = quantize_rows(flat.view(-1, x.shape[-1]))
            return codes.view(x.shape), scales.view(*x.shape[:-1], 1)
        tensor_scale = _launch_tensor_scale(flat) if scale is None else scale.reshape(1)
        return _launch_flat(flat, tensor_scale), tensor_scale


def quantize_int8_reference(
    x: torch.Tensor, *, granularity: Granularity = "per_token", scale: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch twin of `quantize_int8`, equal to it bit for bit, on any device."""
    _check(x, granularity, scale)
    return _quantize_torch(x, granularity, scale)


def quantize_rows(
    x: torch.Tensor,
    *,
    codes: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    plan: "RoutingPlan | None" = None,
    num_experts: int = 0,
    expert_scale: torch.Tensor | None = None,
    router_weight: torch.Tensor | None = None,
    pairs_per_row: int = 1,
    copies: int = 0,
    trigger_first: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Launch the row quantization: x [R, N] -> codes int8 [R * pairs_per_row, N], scales float32 [R * pairs_per_row].

    Output row p comes from row p // pairs_per_row of x, multiplied in float32 by router_weight[p] where given.
    With `topk_ids` (P elements), rows whose id is not in 0..num_experts-1 are left unwritten; `expert_scale`
    (float32 [E]) then fixes the scale of row p to expert_scale[topk_ids[p]] instead of the row's own. With `plan`, rows
    are in its sorted order: row i belongs to pair plan.pairs[i], and rows past the last pair are left unwritten.
    With `copies` as well, those of x are not: row r of x has that many pairs, from r * copies on, and what it becomes
    is written to the rows plan.rows of those whose expert is here: codes [R * copies, N], scales [R * copies].
    `trigger_first` lets the next launch start before this one's inputs are complete (see `dependent_jit`).
    """
    from .quantize_jit import quantize_rows_kernel

    rows, width = x.shape[0] * pairs_per_row, x.shape[1]
    written = rows * max(copies, 1)
    codes = torch.empty((written, width), dtype=torch.int8, device=x.device) if codes is None else codes
    scales = torch.empty(written, dtype=torch.float32, device=x.device) if scales is None else scales
    in_order = plan if not copies else None
    cut = row_constants(rows, width, copied=copies > 0)
    quantize_rows_kernel[(-(-rows // cut["ROWS"]),)](
        x,
        codes,
        scales,
        topk_ids,
        None if in_order is None else in_order.pairs,
        plan.rows if copies and plan is not None else None,
        None if in_order is None else in_order.totals,
        expert_scale,
        router_weight,
        x.stride(0),
        width,
        rows,
        num_experts,
        PAIRS_PER_ROW=pairs_per_row,
        COPIES=copies,
        TRIGGER_FIRST=trigger_first,
        **cut,
        **dependence(x.device),
    )
    return codes, scales


def row_constants(rows: int, width: int, *, copied: bool = False) -> dict[str, Any]:
    """How the row quantization of `rows` rows of `width` elements is cut into programs, and what else is fixed."""
    options = choose_row_options(rows, width, copied=copied)
    chunks = -(-width // options.block)
    return {
        "MIN_SCALE": MIN_SCALE,
        "INTERPRETED": interpreting(),
        "ROWS": options.rows,
        "BLOCK_N": options.block,
        "CHUNKS": chunks if chunks <= _MAX_UNROLLED else 0,
        "num_warps": options.num_warps,
    }


def quantize_rows_reference(
    x: torch.Tensor,
    *,
    topk_ids: torch.Tensor | None = None,
    num_experts: int = 0,
    expert_scale: torch.Tensor | None = None,
    router_weight: torch.Tensor | None = None,
    pairs_per_row: int = 1,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Torch twin of `quantize_rows`; the rows that it leaves unwritten get codes 0 and scale 0 here."""
    values = x.float().repeat_interleave(pairs_per_row, dim=0)
    if router_weight is not None:
        values = values * router_weight.reshape(-1, 1)
    absmax = _absmax(values)
    if expert_scale is None or topk_ids is None:
        scales = _scale_of(absmax)
    else:
        ids = topk_ids.reshape(-1).clamp(0, num_experts - 1).long()
        scales = expert_scale[ids].unsqueeze(-1)
    scales = torch.where(torch.isfinite(absmax), scales, torch.nan)
    codes = _codes_of(values, scales)
    if topk_ids is not None:
        here = ((topk_ids >= 0) & (topk_ids < num_experts)).reshape(-1, 1)
        codes, scales = codes * here, torch.where(here, scales, 0.0)
    return codes, scales.squeeze(-1)


def _quantize_torch(
    x: torch.Tensor, granularity: Granularity, scale: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    values = x.detach().float()
    if granularity == "per_token":
        absmax = _absmax(values)
        scales = torch.where(torch.isfinite(absmax), _scale_of(absmax), torch.nan)
        return _codes_of(values, scales), scales
    if scale is None:
        finite = torch.where(torch.isfinite(values), values, 0.0)
        scale = _scale_of(_absmax(finite.reshape(1, -1)))
    scale = scale.reshape(1)
    return _codes_of(values, scale), scale


def _absmax(values: torch.Tensor) -> torch.Tensor:
    """Largest magnitude along the last dimension, kept; infinite where there is a NaN, 0 for an empty row."""
    if values.shape[-1] == 0:
        return values.new_zeros((*values.shape[:-1], 1))
    return values.abs().nan_to_num(nan=torch.inf, posinf=torch.inf).amax(-1, keepdim=True)


def _scale_of(absmax: torch.Tensor) -> torch.Tensor:
    # A tensor divisor: torch on CUDA turns the division by a Python number into a multiplication by its reciprocal.
    return (absmax / torch.full_like(absmax, CODE_MAX)).clamp(min=MIN_SCALE)


def _codes_of(values: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    quotient = (values / scales).clamp(-CODE_MAX, CODE_MAX).nan_to_num(nan=0.0)
    return quotient.round().to(torch.int8)


def _launch_tensor_scale(x: torch.Tensor) -> torch.Tensor:
    from .quantize_jit import absmax_kernel, tensor_scale_kernel

    blocks = -(-x.numel() // _FLAT_BLOCK)
    partials = torch.empty(min(blocks, _MAX_PARTIALS), dtype=torch.float32, device=x.device)
    scale = torch.empty(1, dtype=torch.float32, device=x.device)
    absmax_kernel[(partials.numel(),)](x, partials, x.numel(), BLOCK=_FLAT_BLOCK)
    tensor_scale_kernel[(1,)](partials, scale, partials.numel(), MIN_SCALE=MIN_SCALE, BLOCK=_MAX_PARTIALS)
    return scale


def _launch_flat(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from .quantize_jit import quantize_flat_kernel

    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    quantize_flat_kernel[(-(-x.numel() // _FLAT_BLOCK),)](x, codes, scale, x.numel(), BLOCK=_FLAT_BLOCK)
    return codes


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
