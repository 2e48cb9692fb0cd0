"""The reduction over a token's experts: out_t = sum over slots j, ascending, of router_weight[t, j] * y[t, j].

The sum is float32, in a fixed order, and rounds once to the dtype of `out`. Slots whose id is outside 0..E-1 add
nothing, whatever their weight and their row of y hold; a token without any other gets 0.
"""

import torch

from ..backend import dependence, interpreting
from ..options import choose_combine_options
from .prepared import launch


def combine_experts(
    expert_out: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    num_experts: int,
    out: torch.Tensor,
) -> torch.Tensor:
    """Launch the reduction: expert_out [P, H], topk_weights float32 [M, K] (None: all 1), topk_ids -> out [M, H]."""
    from ..jit.combine import combine_kernel

    tokens, hidden = out.shape
    options = choose_combine_options(hidden)
    launch(
        combine_kernel,
        (tokens, -(-hidden // options.block)),
        expert_out,
        topk_weights,
        topk_ids,
        out,
        hidden,
        num_experts,
        TOP_K=topk_ids.shape[1],
        INTERPRETED=interpreting(),
        BLOCK_H=options.block,
        num_warps=options.num_warps,
        **dependence(out.device),
    )
    return out


def combine_experts_reference(
    expert_out: torch.Tensor,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    num_experts: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Torch twin of `combine_experts`."""
    tokens, top_k = topk_ids.shape
    values = expert_out.float().view(tokens, top_k, -1)
    if topk_weights is not None:
        values = values * topk_weights.unsqueeze(-1)
    here = ((topk_ids >= 0) & (topk_ids < num_experts)).unsqueeze(-1)
    values = torch.where(here, values, 0.0)
    total = torch.zeros_like(values[:, 0])
    for slot in range(top_k):
        total += values[:, slot]
    return total.to(dtype)
