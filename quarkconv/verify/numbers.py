"""Numbers: does the INT8 forward of each layer compute what the model is.

For each MoE layer, random hidden states are routed as the model routes them, and the INT8 forward of the kernels is
compared with two references that share no code with it (:mod:`quarkconv.verify.reference`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Final

import torch
from torch import Tensor

from quarkconv.experts.naming import ROLES, Role
from quarkconv.experts.topology import MoELayer
from quarkconv.kernels import fused_experts_int8
from quarkconv.verify.activation import ExpertActivation, expert_activation
from quarkconv.verify.loading import ExpertReader, FusedExperts, Projection
from quarkconv.verify.reference import CODE_MAX, both_forwards
from quarkconv.verify.results import Distance, LayerNumbers, Problem
from quarkconv.verify.routing import Routing, route, router_tensor_names, routing_from_config, uniform_routing

DTYPE: Final = torch.bfloat16

EXACT_BOUND: Final = 2.0**-10
"""Bound on the relative error against the exact reference. Both round at the same places; they differ only where the
kernel's float32 epilogue falls on the other side of a rounding to bfloat16 or to a code. That happens to few elements,
each by one step (2^-8 of a value), so the whole stays below a quarter of a step. Leaving out one of the roundings, or
taking it elsewhere, costs 2^-9 and more."""

DYNAMIC_BOUND: Final = 0.05
"""Bound on the relative error against activations that are not rounded. A row whose largest value is c times its root
mean square gets a noise of c / (127 * sqrt(12)) = c / 440 from 8 bits; the rows of gated activations have c up to about
15. Activations of fewer bits, or scales that belong elsewhere, do not stay within it."""

STATIC_BOUND: Final = 0.10
"""The same where a tensor has one static scale. It was chosen for other inputs than the random ones here, and for all
tokens at once, so most rows use half of the codes or fewer and their noise is twice as large."""


def verify_layer(
    layer: MoELayer,
    reader: ExpertReader,
    source: tuple[MoELayer, ExpertReader] | None,
    *,
    device: torch.device,
    tokens: int,
    seed: int,
    problems: list[Problem],
) -> LayerNumbers:
    """Run one layer and compare.

    Args:
        layer: the layer of the checkpoint.
        reader: reads the checkpoint.
        source: the same layer of the source and its reader; the references are then built from the source's tensors.
        device: where to compute.
        tokens: number of random tokens; some are added to reach every expert.
        seed: of the random tokens.
        problems: where mismatches are added.
    """
    started = time.perf_counter()
    experts = reader.fused(layer, device)
    problems.extend(_scale_problems(experts))
    if source is not None:
        problems.extend(_source_problems(experts, *source))
    activation = expert_activation(reader.description.checkpoint.config, layer.index)
    said = activation.describe() if activation else "silu (the config names one that is not known)"
    activation = activation or ExpertActivation("silu")
    hidden_states = _hidden_states(experts, tokens, seed)
    weights, ids, routing = _route(layer, reader, hidden_states, seed)
    hidden_states, weights, ids = _reach_every_expert(experts, hidden_states, weights, ids, seed)
    result = fused_experts_int8(
        hidden_states, experts.w13, experts.w2, experts.w13_scale, experts.w2_scale, weights, ids,
        activation=activation.name, activation_limit=activation.limit,
        w13_input_scale=experts.w13_input_scale, w2_input_scale=experts.w2_input_scale,
    )  # fmt: skip
    of_layer, of_reader = source or (layer, reader)
    read = _remembering(lambda role, expert: of_reader.projection(of_layer, role, expert).to(device))
    exact, reference = both_forwards(hidden_states, weights, ids, read, activation)
    noise_bound = DYNAMIC_BOUND if experts.w13_input_scale is None else STATIC_BOUND
    numbers = LayerNumbers(
        layer.index, layer.prefix, experts.experts, len(torch.unique(ids)), routing, said,
        _distance(result.double(), exact.double(), EXACT_BOUND), _distance(result.double(), reference, noise_bound),
        time.perf_counter() - started,
    )  # fmt: skip
    problems.extend(_numbers_problems(numbers))
    return numbers


def backend_name(device: torch.device) -> str:
    """What runs the INT8 forward on a device, for people."""
    from quarkconv.kernels.backend import uses_triton

    return "triton" if uses_triton(device) else "torch, exact integer sums"


def _hidden_states(experts: FusedExperts, tokens: int, seed: int) -> Tensor:
    """Random hidden states [M, H]; under static scales, of a size that uses their range."""
    generator = torch.Generator().manual_seed(seed + 7919 * experts.layer)
    states = torch.randn(tokens, experts.hidden_size, generator=generator)
    if experts.w13_input_scale is not None:
        states *= CODE_MAX * experts.w13_input_scale.min().item() / states.abs().max().clamp(min=1e-6)
    return states.to(experts.w13.device, DTYPE)


def _route(layer: MoELayer, reader: ExpertReader, hidden_states: Tensor, seed: int) -> tuple[Tensor, Tensor, str]:
    """Router weights float32 [M, k], expert ids int64 [M, k], and how they came about."""
    device = hidden_states.device
    routing = routing_from_config(reader.description.checkpoint.config, layer.experts)
    if routing is not None:
        tensors = _router_tensors(routing, layer, reader)
        if tensors is not None:
            weight, bias = tensors
            weights, ids = route(routing, hidden_states, weight.to(device), None if bias is None else bias.to(device))
            return weights.contiguous(), ids.contiguous(), f"the model's own: {routing.describe()}"
    top_k = min(reader.description.geometry.top_k or 2, layer.experts)
    generator = torch.Generator().manual_seed(seed)
    weights, ids = uniform_routing(len(hidden_states), layer.experts, top_k, generator)
    said = f"uniform random top {top_k} of {layer.experts} (the model's own is not known)"
    return weights.to(device), ids.to(device), said


def _router_tensors(routing: Routing, layer: MoELayer, reader: ExpertReader) -> tuple[Tensor, Tensor | None] | None:
    """The router's weight and correction bias; None when they are not stored as expected."""
    weight_name, bias_name = router_tensor_names(routing, layer.moe)
    if not reader.has(weight_name) or (bias_name is not None and not reader.has(bias_name)):
        return None
    weight = reader.tensor(weight_name)
    bias = None if bias_name is None else reader.tensor(bias_name)
    fits = tuple(weight.shape) == (layer.experts, layer.hidden) and weight.is_floating_point()
    return (weight, bias) if fits and (bias is None or tuple(bias.shape) == (layer.experts,)) else None


def _reach_every_expert(
    experts: FusedExperts, hidden_states: Tensor, weights: Tensor, ids: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Add tokens that are sent to the experts which the routing left out, so that no expert goes unchecked."""
    top_k = ids.shape[1]
    present = torch.zeros(experts.experts, dtype=torch.bool, device=ids.device)
    present[ids.flatten()] = True
    missing = torch.nonzero(~present).flatten()
    if len(missing) == 0:
        return hidden_states, weights, ids
    others = torch.nonzero(present).flatten()
    order = torch.cat([missing, others])  # full rows of distinct experts: the last row is filled up with reached ones
    extra = -(-len(missing) // top_k)
    extra_ids = order[: extra * top_k].reshape(extra, top_k)
    extra_states = _hidden_states(experts, extra, seed + 1)
    extra_weights = torch.full((extra, top_k), 1.0 / top_k, device=weights.device)
    return (
        torch.cat([hidden_states, extra_states]),
        torch.cat([weights, extra_weights]).contiguous(),
        torch.cat([ids, extra_ids]).contiguous(),
    )


def _remembering(read: Callable[[Role, int], Projection]) -> Callable[[Role, int], Projection]:
    """Both references use an expert one after the other; keep the last one only, so that memory stays small."""
    last: dict[tuple[Role, int], Projection] = {}

    def reading(role: Role, expert: int) -> Projection:
        if (role, expert) not in last:
            if len(last) >= len(ROLES):
                last.clear()
            last[role, expert] = read(role, expert)
        return last[role, expert]

    return reading


def _distance(result: Tensor, reference: Tensor, bound: float) -> Distance:
    difference = result - reference
    noise, signal = difference.norm().item(), reference.norm().item()
    relative = noise / signal if signal else (0.0 if noise == 0 else math.inf)
    both = result.norm().item() * signal
    cosine = (result * reference).sum().item() / both if both else math.nan
    rms = signal / math.sqrt(reference.numel()) if reference.numel() else 1.0
    largest = difference.abs().max().item() / rms if rms else math.inf
    snr = -20 * math.log10(relative) if 0 < relative < math.inf else None
    return Distance(relative, cosine, snr, largest, bound)


def _scale_problems(experts: FusedExperts) -> list[Problem]:
    """Scales that are no positive numbers."""
    found = []
    scales = {"w13 scale": experts.w13_scale, "w2 scale": experts.w2_scale}
    for name, scale in scales.items():
        bad = ~(torch.isfinite(scale) & (scale > 0)).flatten(1).all(dim=1)
        if bad.any():
            numbers = torch.nonzero(bad).flatten().tolist()
            message = f"The {name} of expert {numbers[0]} is not finite and positive everywhere"
            found.append(Problem("numbers", experts.layer, experts.prefix, message, len(numbers)))
    return found


def _source_problems(experts: FusedExperts, layer: MoELayer, reader: ExpertReader) -> list[Problem]:
    """Codes and scales that are not those of the source, by expert and projection."""
    inner = experts.intermediate_size
    halves = {"gate": slice(0, inner), "up": slice(inner, 2 * inner), "down": slice(0, experts.hidden_size)}
    found = []
    for expert in range(experts.experts):
        for role in ROLES:
            codes, scale = (experts.w2, experts.w2_scale) if role == "down" else (experts.w13, experts.w13_scale)
            rows = halves[role]
            expected = reader.projection(layer, role, expert)
            same_codes = torch.equal(codes[expert, rows].cpu(), expected.codes)
            same_scale = torch.equal(scale[expert, rows, 0].cpu(), expected.scale)
            if not (same_codes and same_scale):
                what = "codes" if not same_codes else "scale"
                name = f"{experts.prefix}.{expert} ({role})"
                message = f"The {what} of this projection are not those of the source"
                found.append(Problem("numbers", experts.layer, name, message))
    return found


def _numbers_problems(numbers: LayerNumbers) -> list[Problem]:
    checks = (("the exact INT8 reference", numbers.exact), ("the dequantized reference", numbers.reference))
    return [
        Problem(
            "numbers", numbers.layer, numbers.prefix,
            f"The INT8 forward differs from {name}: relative error {distance.relative_error:.3g}, "
            f"bound {distance.bound:.3g}",
        )
        for name, distance in checks
        if not distance.ok
    ]  # fmt: skip
