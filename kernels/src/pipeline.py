"""The forward as a sequence of Triton launches over one set of buffers.

    quantize rows -> route pairs -> gate-up product -> quantize rows -> down product -> combine

Every buffer's size follows from M, K, E, H and I alone and nothing is read back, so that a CUDA graph can capture the
sequence and replay it with other inputs and routings. Run it once before the capture: the kernels compile then.
"""

from dataclasses import dataclass

import torch

from .arguments import ExpertsArguments
from .backend import device_guard, device_traits
from .combine import combine_experts
from .grouped_gemm import grouped_down, grouped_gate_up
from .options import choose_launch_options
from .quantize import quantize_rows
from .routing import PairPlan, RoutingPlan, empty_plan, route_pairs
from .tables import LaunchOptions


@dataclass(frozen=True, slots=True)
class Workspace:
    """The buffers between the launches; R is M, or P when the first product's activation scales are static.

    The rows of `activated`, `hidden_codes` and `hidden_scale` are in the plan's order, all others in that of pairs.

    plan          the routing, or that there is none
    input_codes   int8 [R, H];  input_scale   float32 [R]
    activated     [P, I], dtype of the hidden states
    hidden_codes  int8 [P, I];  hidden_scale  float32 [P]
    expert_out    [P, H], dtype of the hidden states
    """

    plan: RoutingPlan | PairPlan
    input_codes: torch.Tensor
    input_scale: torch.Tensor
    activated: torch.Tensor
    hidden_codes: torch.Tensor
    hidden_scale: torch.Tensor
    expert_out: torch.Tensor


def default_options(arguments: ExpertsArguments) -> LaunchOptions:
    """The launch options for these arguments on the device that they are on."""
    return choose_launch_options(
        arguments.tokens,
        arguments.experts,
        arguments.top_k,
        arguments.hidden,
        arguments.intermediate,
        device_traits(arguments.hidden_states.device),
    )


def empty_workspace(arguments: ExpertsArguments, options: LaunchOptions) -> Workspace:
    """Uninitialized buffers for one forward."""
    device, dtype = arguments.hidden_states.device, arguments.hidden_states.dtype
    pairs, hidden, intermediate = arguments.pairs, arguments.hidden, arguments.intermediate
    input_rows = arguments.tokens if arguments.gate_up_input_scale is None else pairs
    return Workspace(
        plan=empty_plan(pairs, arguments.experts, options.blocks, device)
        if options.sorted
        else PairPlan(arguments.topk_ids, options.blocks),
        input_codes=torch.empty((input_rows, hidden), dtype=torch.int8, device=device),
        input_scale=torch.empty(input_rows, dtype=torch.float32, device=device),
        activated=torch.empty((pairs, intermediate), dtype=dtype, device=device),
        hidden_codes=torch.empty((pairs, intermediate), dtype=torch.int8, device=device),
        hidden_scale=torch.empty(pairs, dtype=torch.float32, device=device),
        expert_out=torch.empty((pairs, hidden), dtype=dtype, device=device),
    )


def run_pipeline(
    arguments: ExpertsArguments,
    out: torch.Tensor,
    options: LaunchOptions | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Write the forward of `arguments` (at least one pair) to `out` [M, H].

    `options` default to the heuristic's and `workspace` to fresh buffers, which must be those for the same options.
    """
    options = default_options(arguments) if options is None else options
    buffers = empty_workspace(arguments, options) if workspace is None else workspace
    with device_guard(out.device):
        _launch(arguments, out, options, buffers)
    return out


def _launch(arguments: ExpertsArguments, out: torch.Tensor, options: LaunchOptions, buffers: Workspace) -> None:
    ids, weights = arguments.topk_ids, arguments.topk_weights
    router_on_input = weights if arguments.apply_router_weight_on_input else None
    static = arguments.gate_up_input_scale is not None
    # A static scale belongs to an expert, so a token is quantized anew for each of its pairs.
    quantize_rows(
        arguments.hidden_states,
        codes=buffers.input_codes,
        scales=buffers.input_scale,
        topk_ids=ids if static else None,
        num_experts=arguments.experts,
        expert_scale=arguments.gate_up_input_scale,
        router_weight=router_on_input if static else None,
        pairs_per_row=arguments.top_k if static else 1,
    )
    plan = buffers.plan
    if isinstance(plan, RoutingPlan):
        route_pairs(ids, arguments.experts, plan)
    grouped_gate_up(
        buffers.input_codes,
        buffers.input_scale,
        arguments.gate_up,
        plan,
        arguments.activation,
        buffers.activated,
        options.gate_up,
        router_weight=None if static else router_on_input,
        pairs_per_row=1 if static else arguments.top_k,
    )
    quantize_rows(
        buffers.activated,
        codes=buffers.hidden_codes,
        scales=buffers.hidden_scale,
        topk_ids=ids,
        plan=plan if isinstance(plan, RoutingPlan) else None,
        num_experts=arguments.experts,
        expert_scale=arguments.down_input_scale,
        trigger_first=True,
    )
    grouped_down(buffers.hidden_codes, buffers.hidden_scale, arguments.down, plan, buffers.expert_out, options.down)
    router_on_output = None if arguments.apply_router_weight_on_input else weights
    combine_experts(buffers.expert_out, router_on_output, ids, arguments.experts, out)
