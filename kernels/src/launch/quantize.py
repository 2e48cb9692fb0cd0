"""Launch of the quantization, of rows and of tensors; `quantize` defines the arithmetic."""

import functools
from typing import Any

import torch

from ..arguments import RoutingPlan
from ..backend import dependence, interpreting
from ..options import choose_row_options
from .prepared import launch

CODE_MAX = 127.0
MIN_SCALE = 2.0**-100

_FLAT_BLOCK = 4096
_MAX_PARTIALS = 1024
_MAX_UNROLLED = 16


def quantize_rows(
    x: torch.Tensor,
    *,
    codes: torch.Tensor | None = None,
    scales: torch.Tensor | None = None,
    topk_ids: torch.Tensor | None = None,
    plan: RoutingPlan | None = None,
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
    `trigger_first` lets the next launch start before this one's inputs are complete (see `jit.dependent`).
    """
    from ..jit.quantize import quantize_rows_kernel

    rows, width = x.shape[0] * pairs_per_row, x.shape[1]
    written = rows * max(copies, 1)
    codes = torch.empty((written, width), dtype=torch.int8, device=x.device) if codes is None else codes
    scales = torch.empty(written, dtype=torch.float32, device=x.device) if scales is None else scales
    in_order = plan if not copies else None
    cut = row_constants(rows, width, copied=copies > 0)
    launch(
        quantize_rows_kernel,
        (-(-rows // cut["ROWS"]),),
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
    return {"INTERPRETED": interpreting(), **_cut_of_rows(rows, width, copied=copied)}


@functools.lru_cache(maxsize=4096)
def _cut_of_rows(rows: int, width: int, *, copied: bool) -> dict[str, Any]:
    options = choose_row_options(rows, width, copied=copied)
    chunks = -(-width // options.block)
    return {
        "MIN_SCALE": MIN_SCALE,
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


def launch_tensor_scale(x: torch.Tensor) -> torch.Tensor:
    from ..jit.quantize import absmax_kernel, tensor_scale_kernel

    blocks = -(-x.numel() // _FLAT_BLOCK)
    partials = torch.empty(min(blocks, _MAX_PARTIALS), dtype=torch.float32, device=x.device)
    scale = torch.empty(1, dtype=torch.float32, device=x.device)
    absmax_kernel[(partials.numel(),)](x, partials, x.numel(), BLOCK=_FLAT_BLOCK)
    tensor_scale_kernel[(1,)](partials, scale, partials.numel(), MIN_SCALE=MIN_SCALE, BLOCK=_MAX_PARTIALS)
    return scale


def quantize_flat(x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    from ..jit.quantize import quantize_flat_kernel

    codes = torch.empty(x.shape, dtype=torch.int8, device=x.device)
    quantize_flat_kernel[(-(-x.numel() // _FLAT_BLOCK),)](x, codes, scale, x.numel(), BLOCK=_FLAT_BLOCK)
    return codes


def quantize_tensor_reference(
    x: torch.Tensor, granularity: str, scale: torch.Tensor | None
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
