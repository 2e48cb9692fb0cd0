"""The two grouped products: int8 codes times int8 weights, one expert per row block, with their epilogues.

Gate-up, for pair p of expert e (row r = p // pairs_per_row of the codes):

    g = (sum_h codes[r, h] * w13[e, i, h])     * row_scale[r] * w13_scale[e, i]     + bias[e, i]
    u = (sum_h codes[r, h] * w13[e, I + i, h]) * row_scale[r] * w13_scale[e, I + i] + bias[e, I + i]
    out[p, i] = act(g, u)

Where the activation has no gate, w13 has I rows: u = (sum_h codes[r, h] * w13[e, i, h]) ..., out[p, i] = act(u). Down:

    out[p, o] = (sum_i codes[p, i] * w2[e, o, i]) * row_scale[p] * w2_scale[e, o] + bias[e, o]

Sums are int32 and exact, the rest is float32, and the store rounds once to the dtype of `out`. An int32 `out` ([P, 2I]
for gate-up) receives the sums themselves instead, for tests. Rows of pairs that the routing leaves out are not written.
"""

from typing import Any

import torch

from ..activations import Activation, activate_reference
from ..arguments import ExpertWeights, GroupedProduct, RoutingPlan
from ..backend import dependence, device_traits, interpreting
from ..tables import TileOptions
from .descriptors import can_describe, describe
from .prepared import launch
from .specialized import launch_specialized

# The sum of this many products of codes of magnitude at most 128 is at most 2^24, so that every partial sum, in any
# order, is an integer that float32 holds exactly.
_EXACT_F32_DEPTH = 1024


def grouped_gate_up(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weights: ExpertWeights,
    plan: RoutingPlan,
    activation: Activation,
    out: torch.Tensor,
    options: TileOptions,
    *,
    router_weight: torch.Tensor | None = None,
    pairs_per_row: int,
) -> torch.Tensor:
    """Launch the gate-up product: codes int8 [R, H], row_scale float32 [R] -> out [P, I], in the plan's row order.

    Row p // pairs_per_row of the codes serves pair p; with pairs_per_row 0, codes and row_scale are in the plan's row
    order too. `router_weight` (float32, P elements), where given, multiplies row_scale.
    """
    _launch(GroupedProduct(codes, row_scale, weights, router_weight, activation, pairs_per_row, plan, out), options)
    return out


def grouped_down(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weights: ExpertWeights,
    plan: RoutingPlan,
    out: torch.Tensor,
    options: TileOptions,
) -> torch.Tensor:
    """Launch the down product: codes int8 [P, I], row_scale float32 [P], in row order -> out [P, H], in pair order."""
    _launch(GroupedProduct(codes, row_scale, weights, None, None, 0, plan, out), options)
    return out


def _launch(product: GroupedProduct, options: TileOptions) -> None:
    codes, weights, plan, out = product.codes, product.weights, product.plan, product.out
    in_order = product.pairs_per_row == 0
    described = in_order and can_describe(codes) and can_describe(weights.codes)
    if options.specialized and described and device_traits(out.device).warp_specialization:
        launch_specialized(product, options)
        return
    from ..jit.grouped_gemm import grouped_product_kernel

    options = options.without_specialization()
    launch(
        grouped_product_kernel,
        (plan.max_blocks * -(-product.columns // options.block_n),),
        codes,
        _descriptor(codes, plan.blocks.block_m, options) if in_order else None,
        product.row_scale,
        weights.codes,
        _descriptor(weights.codes, options.block_n, options),
        weights.scale,
        weights.bias,
        product.router_weight,
        out,
        *plan.for_products(),
        plan.max_blocks,
        product.depth,
        product.columns,
        *product.limits,
        PAIRS_PER_ROW=product.pairs_per_row,
        INTERPRETED=interpreting(),
        **product.constants,
        **tile_constants(options, product.depth),
        **dependence(out.device),
    )


def tile_constants(options: TileOptions, depth: int) -> dict[str, Any]:
    """The constants of the kernel that follow from its tile and the summed dimension."""
    return {
        "EVEN_D": depth % options.block_k == 0,
        "BLOCK_N": options.block_n,
        "BLOCK_D": options.block_k,
        "GROUP_M": options.group_m,
        "num_warps": options.num_warps,
        "num_stages": options.num_stages,
    }


def _descriptor(codes: torch.Tensor, rows: int, options: TileOptions) -> Any:
    return describe(codes, rows, options.block_k) if options.descriptors and can_describe(codes) else None


def grouped_gate_up_reference(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weights: ExpertWeights,
    topk_ids: torch.Tensor,
    activation: Activation,
    dtype: torch.dtype,
    *,
    router_weight: torch.Tensor | None = None,
    pairs_per_row: int,
) -> torch.Tensor:
    """Torch twin of `grouped_gate_up`; rows that it leaves unwritten are 0 here."""
    intermediate = weights.codes.shape[1] // (2 if activation.gated else 1)
    out = torch.zeros((topk_ids.numel(), intermediate), dtype=dtype, device=codes.device)
    for expert, pairs in _pairs_by_expert(topk_ids, weights.codes.shape[0]):
        rows = pairs // pairs_per_row
        scale = row_scale[rows]
        if router_weight is not None:
            scale = scale * router_weight.reshape(-1)[pairs]
        sums = int8_matmul_reference(codes[rows], weights.codes[expert])
        gate_up = _dequantize(sums, scale, weights, expert)
        gate, up = (gate_up[:, :intermediate], gate_up[:, intermediate:]) if activation.gated else (None, gate_up)
        out[pairs] = activate_reference(gate, up, activation).to(dtype)
    return out


def grouped_down_reference(
    codes: torch.Tensor, row_scale: torch.Tensor, weights: ExpertWeights, topk_ids: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Torch twin of `grouped_down`; rows that it leaves unwritten are 0 here."""
    out = torch.zeros((topk_ids.numel(), weights.codes.shape[1]), dtype=dtype, device=codes.device)
    for expert, pairs in _pairs_by_expert(topk_ids, weights.codes.shape[0]):
        sums = int8_matmul_reference(codes[pairs], weights.codes[expert])
        out[pairs] = _dequantize(sums, row_scale[pairs], weights, expert).to(dtype)
    return out


def int8_matmul_reference(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """a int8 [m, d] times the transpose of b int8 [n, d] -> int32 [m, n], exact.

    The float32 products run over slices of the summed dimension short enough that no partial sum needs rounding.
    """
    sums = torch.zeros((a.shape[0], b.shape[0]), dtype=torch.int32, device=a.device)
    for start in range(0, a.shape[1], _EXACT_F32_DEPTH):
        part = slice(start, start + _EXACT_F32_DEPTH)
        sums += (a[:, part].float() @ b[:, part].float().t()).to(torch.int32)
    return sums


def _dequantize(sums: torch.Tensor, row_scale: torch.Tensor, weights: ExpertWeights, expert: int) -> torch.Tensor:
    values = sums.float() * row_scale.unsqueeze(-1) * weights.scale[expert].reshape(1, -1)
    return values if weights.bias is None else values + weights.bias[expert].float()


def _pairs_by_expert(topk_ids: torch.Tensor, num_experts: int) -> list[tuple[int, torch.Tensor]]:
    """(expert, its pairs in ascending order) for the experts that have any."""
    ids = topk_ids.reshape(-1)
    experts = [e for e in torch.unique(ids).tolist() if 0 <= e < num_experts]
    return [(e, torch.nonzero(ids == e).flatten()) for e in experts]
