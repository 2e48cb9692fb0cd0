"""The torch twin of the whole forward: the same stages, the same roundings, for any device.

It is what CPU tensors get, and what the kernels are tested against. Sums of codes are exact; codes and scales equal
the kernels' bit for bit given the same rows; the float32 epilogues may differ in the last bits (the kernels may
contract a product and a sum into one rounding, and use the GPU's exponential).
"""

import torch

from .arguments import ExpertsArguments
from .launch.combine import combine_experts_reference
from .launch.grouped_gemm import grouped_down_reference, grouped_gate_up_reference
from .launch.quantize import quantize_rows_reference


@torch.no_grad()
def run_reference(arguments: ExpertsArguments) -> torch.Tensor:
    """The forward of checked arguments, stage by stage as `pipeline` launches it."""
    ids, weights = arguments.topk_ids, arguments.topk_weights
    dtype = arguments.hidden_states.dtype
    if arguments.pairs == 0:
        return torch.zeros_like(arguments.hidden_states, memory_format=torch.contiguous_format)
    router_on_input = weights if arguments.apply_router_weight_on_input else None
    static = arguments.gate_up_input_scale is not None
    codes, scale = quantize_rows_reference(
        arguments.hidden_states,
        topk_ids=ids if static else None,
        num_experts=arguments.experts,
        expert_scale=arguments.gate_up_input_scale,
        router_weight=router_on_input if static else None,
        pairs_per_row=arguments.top_k if static else 1,
    )
    activated = grouped_gate_up_reference(
        codes,
        scale,
        arguments.gate_up,
        ids,
        arguments.activation,
        dtype,
        router_weight=None if static else router_on_input,
        pairs_per_row=1 if static else arguments.top_k,
    )
    codes, scale = quantize_rows_reference(
        activated, topk_ids=ids, num_experts=arguments.experts, expert_scale=arguments.down_input_scale
    )
    expert_out = grouped_down_reference(codes, scale, arguments.down, ids, dtype)
    router_on_output = None if arguments.apply_router_weight_on_input else weights
    return combine_experts_reference(expert_out, router_on_output, ids, arguments.experts, dtype)
