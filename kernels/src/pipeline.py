"""The forward as a sequence of Triton launches over one set of buffers.

    quantize rows, route pairs -> gate-up product -> quantize rows -> down product -> combine

or, for so few pairs that each reads its weights for itself,

    quantize rows -> gate-up product -> quantize rows -> down product with the sum over experts

Every buffer's size follows from M, K, E, H and I alone and nothing is read back, so that a CUDA graph can capture the
sequence and replay it with other inputs and routings. Run it once before the capture: the kernels compile then.
"""

from dataclasses import dataclass, replace

import torch

from .arguments import ExpertsArguments, RoutingPlan
from .backend import device_guard, device_traits
from .launch.combine import combine_experts
from .launch.descriptors import can_describe
from .launch.grouped_gemm import grouped_down, grouped_gate_up
from .launch.grouped_gemv import can_pack, combined_down_gemv, grouped_gate_up_gemv
from .launch.prepared import Buffer, allocate
from .launch.quantize import quantize_rows
from .launch.routing import plan_buffers, quantize_and_route, route_pairs
from .options import choose_launch_options
from .tables import GemvOptions, LaunchOptions, Options

_MOST_PROGRAMS = 65535  # along the second dimension of a CUDA grid, which a GEMV has for pairs


@dataclass(frozen=True, slots=True)
class Workspace:
    """The buffers between the launches; R is M, or P when the first product's activation scales are static, or where
    its rows have the plan's order (`takes_sorted_rows`).

    The rows of `activated`, `hidden_codes` and `hidden_scale` are in the plan's order, all others in that of pairs.

    plan          the routing, None where pairs are not sorted
    expert_out    [P, H], dtype of the hidden states; None where the down product sums over experts itself
    input_codes   int8 [R, H];  input_scale   float32 [R]
    activated     [P, I], dtype of the hidden states
    hidden_codes  int8 [P, I];  hidden_scale  float32 [P]
    """

    plan: RoutingPlan | None
    expert_out: torch.Tensor | None
    input_codes: torch.Tensor
    input_scale: torch.Tensor
    activated: torch.Tensor
    hidden_codes: torch.Tensor
    hidden_scale: torch.Tensor


def default_options(arguments: ExpertsArguments) -> Options:
    """The launch options for these arguments on the device that they are on."""
    return choose_launch_options(
        arguments.tokens,
        arguments.experts,
        arguments.top_k,
        arguments.hidden,
        arguments.intermediate,
        device_traits(arguments.hidden_states.device),
        packed=can_pack(arguments.gate_up) and can_pack(arguments.down),
    )


def takes_sorted_rows(arguments: ExpertsArguments, options: Options) -> bool:
    """Whether rows of the first product are copied into the plan's order before it: TMA does not gather."""
    return (
        isinstance(options, LaunchOptions)
        and options.gate_up.specialized
        and arguments.gate_up_input_scale is None
        and can_describe(arguments.gate_up.codes)
    )


def empty_workspace(arguments: ExpertsArguments, options: Options) -> Workspace:
    """Uninitialized buffers for one forward."""
    device, dtype = arguments.hidden_states.device, arguments.hidden_states.dtype
    pairs, hidden, intermediate = arguments.pairs, arguments.hidden, arguments.intermediate
    by_token = arguments.gate_up_input_scale is None and not takes_sorted_rows(arguments, options)
    input_rows = arguments.tokens if by_token else pairs
    rows: list[Buffer] = [
        ((input_rows, hidden), torch.int8),
        ((input_rows,), torch.float32),
        ((pairs, intermediate), dtype),
        ((pairs, intermediate), torch.int8),
        ((pairs,), torch.float32),
    ]
    if not isinstance(options, LaunchOptions):
        return Workspace(None, None, *allocate(rows, device))
    of_plan = [((pairs, hidden), dtype), *plan_buffers(pairs, arguments.experts, options.blocks)]
    buffers = allocate([*rows, *of_plan], device)
    expert_out, *plan = buffers[len(rows) :]
    return Workspace(RoutingPlan(options.blocks, *plan), expert_out, *buffers[: len(rows)])


def run_pipeline(
    arguments: ExpertsArguments,
    out: torch.Tensor,
    options: Options | None = None,
    workspace: Workspace | None = None,
) -> torch.Tensor:
    """Write the forward of `arguments` (at least one pair) to `out` [M, H].

    `options` default to the heuristic's and `workspace` to fresh buffers, which must be those for the same options.
    """
    options = default_options(arguments) if options is None else options
    if isinstance(options, GemvOptions) and arguments.pairs > _MOST_PROGRAMS:
        for part in _parts(arguments.tokens, _MOST_PROGRAMS // arguments.top_k):
            tokens = {n: getattr(arguments, n)[part] for n in ("hidden_states", "topk_weights", "topk_ids")}
            run_pipeline(replace(arguments, **tokens), out[part], options)
        return out
    buffers = empty_workspace(arguments, options) if workspace is None else workspace
    with device_guard(out.device):
        if isinstance(options, GemvOptions):
            _launch_for_pairs(arguments, out, options, buffers)
        else:
            _launch_sorted(arguments, out, options, buffers)
    return out


def _parts(count: int, size: int) -> list[slice]:
    return [slice(first, min(first + size, count)) for first in range(0, count, size)]


def _launch_for_pairs(arguments: ExpertsArguments, out: torch.Tensor, options: GemvOptions, buffers: Workspace) -> None:
    """Each pair reads its weights for itself; the down product sums over experts."""
    ids = arguments.topk_ids
    _quantize_inputs(arguments, buffers)
    grouped_gate_up_gemv(
        buffers.input_codes,
        buffers.input_scale,
        arguments.gate_up,
        ids,
        arguments.activation,
        buffers.activated,
        options.gate_up,
        router_weight=_weight_of_inputs(arguments),
        pairs_per_row=_pairs_per_row(arguments),
    )
    _quantize_hidden(arguments, buffers)
    hidden = (buffers.hidden_codes, buffers.hidden_scale, arguments.down)
    combined_down_gemv(*hidden, _weight_of_outputs(arguments), ids, out, options.down)


def _launch_sorted(arguments: ExpertsArguments, out: torch.Tensor, options: LaunchOptions, buffers: Workspace) -> None:
    """Pairs are sorted by expert, and each block of rows reads an expert's weights once."""
    ids, plan, expert_out = arguments.topk_ids, buffers.plan, buffers.expert_out
    assert plan is not None, "a workspace for other options"
    assert expert_out is not None, "a workspace for other options"
    sorted_rows = takes_sorted_rows(arguments, options)
    if sorted_rows:
        route_pairs(ids, arguments.experts, plan)
        quantize_rows(
            arguments.hidden_states,
            codes=buffers.input_codes,
            scales=buffers.input_scale,
            topk_ids=ids,
            plan=plan,
            num_experts=arguments.experts,
            copies=arguments.top_k,
        )
    elif arguments.gate_up_input_scale is not None:
        _quantize_inputs(arguments, buffers)
        route_pairs(ids, arguments.experts, plan)
    else:
        x = arguments.hidden_states
        quantize_and_route(x, buffers.input_codes, buffers.input_scale, ids, arguments.experts, plan)
    grouped_gate_up(
        buffers.input_codes,
        buffers.input_scale,
        arguments.gate_up,
        plan,
        arguments.activation,
        buffers.activated,
        options.gate_up,
        router_weight=_weight_of_inputs(arguments),
        pairs_per_row=0 if sorted_rows else _pairs_per_row(arguments),
    )
    _quantize_hidden(arguments, buffers)
    grouped_down(buffers.hidden_codes, buffers.hidden_scale, arguments.down, plan, expert_out, options.down)
    combine_experts(expert_out, _weight_of_outputs(arguments), ids, arguments.experts, out)


def _pairs_per_row(arguments: ExpertsArguments) -> int:
    """Pairs that one row of the input's codes serves.

    A static scale belongs to an expert, so a token is quantized anew for each of its pairs.
    """
    return arguments.top_k if arguments.gate_up_input_scale is None else 1


def _weight_of_inputs(arguments: ExpertsArguments) -> torch.Tensor | None:
    """The router weights that multiply the scales of input rows; static scales have them from `_quantize_inputs`."""
    dynamic = arguments.gate_up_input_scale is None
    return arguments.topk_weights if arguments.apply_router_weight_on_input and dynamic else None


def _weight_of_outputs(arguments: ExpertsArguments) -> torch.Tensor | None:
    return None if arguments.apply_router_weight_on_input else arguments.topk_weights


def _quantize_inputs(arguments: ExpertsArguments, buffers: Workspace) -> None:
    """A row for each token, or for each pair where activation scales are static."""
    static = arguments.gate_up_input_scale is not None
    quantize_rows(
        arguments.hidden_states,
        codes=buffers.input_codes,
        scales=buffers.input_scale,
        topk_ids=arguments.topk_ids if static else None,
        num_experts=arguments.experts,
        expert_scale=arguments.gate_up_input_scale,
        router_weight=arguments.topk_weights if static and arguments.apply_router_weight_on_input else None,
        pairs_per_row=arguments.top_k if static else 1,
    )


def _quantize_hidden(arguments: ExpertsArguments, buffers: Workspace) -> None:
    quantize_rows(
        buffers.activated,
        codes=buffers.hidden_codes,
        scales=buffers.hidden_scale,
        topk_ids=arguments.topk_ids,
        plan=buffers.plan,
        num_experts=arguments.experts,
        expert_scale=arguments.down_input_scale,
        trigger_first=True,
    )
