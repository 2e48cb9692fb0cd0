"""Numbers: does the INT8 forward of each layer compute what the model is.

For each MoE layer, hidden states (:mod:`quarkconv.verify.inputs`) are routed as the model routes them, and the INT8
forward of the kernels is compared with two references that share no code with it (:mod:`quarkconv.verify.reference`).
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from quarkconv.experts.function import ExpertActivation, Unknown
from quarkconv.experts.naming import ROLES, Role
from quarkconv.experts.topology import MoELayer
from quarkconv.kernels import fused_experts_int8
from quarkconv.load.experts import FusedExperts, Projection
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify.inputs import RecordedInputs, plain_inputs, random_inputs, rounding_noise
from quarkconv.verify.reference import both_forwards, float_forward
from quarkconv.verify.results import Distance, LayerNumbers, Problem
from quarkconv.verify.routing import (
    RouterExtras,
    Routing,
    hidden_size_of,
    route,
    router_tensor_names,
    routing_of,
    uniform_routing,
)

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
tokens at once, so most rows use half of the codes or fewer and their noise is twice as large.

Both are for Gaussian inputs, whose own noise is small (c is about 4). For others, twice the noise that 8 bits add to
the very inputs is added: gate and up see the same error, and their product has it twice where both point one way."""


@dataclass(frozen=True, slots=True)
class Router:
    """A model's routing and its tensors.

    Attributes:
        routing: how it routes.
        weight: [E, H], of the model's hidden size, which may be another than that of its experts' input.
        bias: the correction bias [E].
        extras: tensors that few routers have.
    """

    routing: Routing
    weight: Tensor
    bias: Tensor | None = None
    extras: RouterExtras = RouterExtras()  # noqa: RUF009 - a tuple of None

    def tensors(self) -> list[Tensor]:
        """All that it has."""
        return [tensor for tensor in (self.weight, self.bias, *self.extras) if tensor is not None]

    def to(self, device: torch.device) -> Router:
        """The same on a device."""
        weight, bias, *extras = (
            None if tensor is None else tensor.to(device) for tensor in (self.weight, self.bias, *self.extras)
        )
        assert weight is not None
        return Router(self.routing, weight, bias, RouterExtras(*extras))


@dataclass(frozen=True, slots=True)
class CheckedLayer:
    """A layer that is loaded and ready to be checked.

    Attributes:
        layer: the layer.
        experts: its experts, on the device where it is checked.
        activation: what the experts compute between their products.
        top_k: experts per token, where the config says.
        router: the model's own routing, or why it is not known.
        source: the same layer of the source, on the same device; the references are then built from it.
        unquantized: gives the unquantized weight of a projection, float64 [out, in] on the same device.
    """

    layer: MoELayer
    experts: FusedExperts
    activation: ExpertActivation
    top_k: int | None
    router: Router | Unknown
    source: FusedExperts | None = None
    unquantized: Callable[[Role, int], Tensor] | None = None


def verify_layer(
    checked: CheckedLayer, *, tokens: int, seed: int, recorded: RecordedInputs | None, problems: list[Problem]
) -> tuple[LayerNumbers, Tensor]:
    """Run one layer with one number of tokens, and compare.

    Args:
        checked: the layer.
        tokens: number of random tokens; some are added to reach every expert.
        seed: of the random tokens.
        recorded: hidden states to use instead of random ones.
        problems: where mismatches are added.

    Returns:
        The numbers, and how many tokens the routing sent to each expert, int64 [E].
    """
    started = time.perf_counter()
    layer, experts = checked.layer, checked.experts
    device = experts.w13.device
    activation = checked.activation
    on_input = isinstance(checked.router, Router) and checked.router.routing.on_input
    inputs = random_inputs(experts, tokens, seed) if recorded is None else recorded.inputs(layer, tokens, device)
    weights, ids, routing = _route(checked, inputs.states, seed)
    load = torch.bincount(ids[ids >= 0], minlength=experts.experts).cpu()
    hidden_states, weights, ids = _reach_every_expert(experts, inputs.states, weights, ids, seed)
    result = fused_experts_int8(
        hidden_states, experts.w13, experts.w2, experts.w13_scale, experts.w2_scale, weights, ids,
        activation=activation.name, activation_limit=activation.limit, activation_alpha=activation.alpha,
        w13_input_scale=experts.w13_input_scale, w2_input_scale=experts.w2_input_scale,
        apply_router_weight_on_input=on_input,
    ).double()  # fmt: skip
    read = _remembering((checked.source or experts).projection)
    exact, dequantized = both_forwards(hidden_states, weights, ids, read, activation, on_input=on_input)
    heavy = slice(inputs.plain, len(inputs.states))
    plain = torch.ones(len(hidden_states), dtype=torch.bool, device=device)
    plain[heavy] = False
    bound = DYNAMIC_BOUND if experts.w13_input_scale is None else STATIC_BOUND
    of_input = bound if recorded is None else bound + 2 * rounding_noise(inputs.states, experts.w13_input_scale)
    outliers = None
    if heavy.start < heavy.stop:
        noise = rounding_noise(inputs.states[heavy], experts.w13_input_scale)
        outliers = _distance(result[heavy], dequantized[heavy], bound + 2 * noise)
    unquantized = None
    if checked.unquantized is not None:
        expected = float_forward(hidden_states, weights, ids, checked.unquantized, activation, on_input=on_input)
        unquantized = _distance(result[plain], expected[plain], math.inf)
    numbers = LayerNumbers(
        layer.index, layer.prefix, tokens, inputs.said, experts.experts, len(torch.unique(ids[ids >= 0])), routing,
        activation.describe(), _distance(result, exact.double(), EXACT_BOUND),
        _distance(result[plain], dequantized[plain], of_input), outliers, unquantized, time.perf_counter() - started,
    )  # fmt: skip
    problems.extend(_numbers_problems(numbers))
    return numbers, load


def layer_problems(checked: CheckedLayer) -> list[Problem]:
    """What is wrong with the scales of a layer, and what differs from the source."""
    found = _scale_problems(checked.experts)
    if checked.source is not None:
        found += _source_problems(checked.experts, checked.source)
    return found


def backend_name(device: torch.device) -> str:
    """What runs the INT8 forward on a device, for people."""
    from quarkconv.kernels.backend import uses_triton

    return "triton" if uses_triton(device) else "torch, exact integer sums"


def unsupported_activation(activation: ExpertActivation) -> str | None:
    """Why the INT8 forward of the kernels cannot compute an activation; None where it can."""
    from quarkconv.kernels.activations import make_activation

    supported = activation.beta is None and activation.linear_beta is None
    try:
        make_activation(activation.name, activation.limit, activation.alpha)
    except ValueError:
        supported = False
    return None if supported else f"the INT8 forward here does not compute {activation.describe()}"


def _route(checked: CheckedLayer, hidden_states: Tensor, seed: int) -> tuple[Tensor, Tensor, str]:
    """Router weights float32 [M, k], expert ids int64 [M, k], and how they came about."""
    device, layer, router = hidden_states.device, checked.layer, checked.router
    generator = torch.Generator().manual_seed(seed)
    if isinstance(router, Router):
        width = router.weight.shape[1]
        if width != hidden_states.shape[1]:  # experts of a latent width: the router sees what it is computed from
            hidden_states = torch.randn(len(hidden_states), width, generator=generator).to(device, hidden_states.dtype)
        router = router.to(device)
        weights, ids = route(router.routing, hidden_states, router.weight, router.bias, router.extras)
        return weights.contiguous(), ids.contiguous(), f"the model's own: {router.routing.describe()}"
    top_k = min(checked.top_k or 2, layer.experts)
    weights, ids = uniform_routing(len(hidden_states), layer.experts, top_k, generator)
    said = f"uniform random top {top_k} of {layer.experts} (the model's own is not known: {router.reason})"
    return weights.to(device), ids.to(device), said


def router_of(layer: MoELayer, config: Mapping[str, Any], files: LayerReader) -> Router | Unknown:
    """The model's own routing with its tensors, or why it is not known."""
    routing = routing_of(config, layer.experts, layer.index, layer.moe)
    if isinstance(routing, Unknown):
        return routing
    names = router_tensor_names(routing, layer.moe, files.has)
    rows = routing.experts + routing.zero_experts
    latent = layer.hidden if (known := hidden_size_of(config, layer.moe)) is None else known
    sizes = {
        names.weight: (rows, latent), names.bias: (rows,), names.logit_bias: (rows,),
        names.input_scale: (latent,), names.expert_scale: (rows,),
    }  # fmt: skip
    for name, shape in sizes.items():
        if name is None:
            continue
        if not files.is_float(name):
            return Unknown(f"{name} is not stored in float" if files.has(name) else f"{name} is not stored")
        found = files.shape(name)
        if found != shape and (name != names.bias or found != (1, *shape)):
            return Unknown(f"{name} has shape {list(found)}, expected {list(shape)}")
    weight, bias, *extras = (None if name is None else files.floats(name) for name in names)
    assert weight is not None
    return Router(routing, weight, None if bias is None else bias.flatten(), RouterExtras(*extras))


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
    extra_states = plain_inputs(experts, extra, seed + 1)
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
            found.append(Problem("numbers", experts.layer, experts.module, message, len(numbers)))
    return found


def _source_problems(experts: FusedExperts, source: FusedExperts) -> list[Problem]:
    """Codes and scales that are not those of the source, by expert and projection."""
    found = []
    for expert in range(experts.experts):
        for role in ROLES:
            mine, theirs = experts.projection(role, expert), source.projection(role, expert)
            same_codes, same_scale = torch.equal(mine.codes, theirs.codes), torch.equal(mine.scale, theirs.scale)
            if not (same_codes and same_scale):
                what = "codes" if not same_codes else "scale"
                name = f"{experts.module}.{expert} ({role})"
                message = f"The {what} of this projection are not those of the source"
                found.append(Problem("numbers", experts.layer, name, message))
    return found


def _numbers_problems(numbers: LayerNumbers) -> list[Problem]:
    checks = (
        ("the exact INT8 reference", numbers.exact),
        ("the dequantized reference", numbers.dequantized),
        ("the dequantized reference with outliers in its inputs", numbers.outliers),
    )
    return [
        Problem(
            "numbers", numbers.layer, numbers.module,
            f"The INT8 forward differs from {name}: relative error {distance.relative_error:.3g}, "
            f"bound {distance.bound:.3g}",
        )
        for name, distance in checks
        if distance is not None and not distance.ok
    ]  # fmt: skip
