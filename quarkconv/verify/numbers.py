"""The numbers of one layer: the INT8 forward of the kernels beside references that share no code with it.

Hidden states (:mod:`quarkconv.verify.inputs`) are routed as the model routes them and sent through the INT8 forward.
The references (:mod:`quarkconv.verify.reference`) compute the same in float64.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quarkconv.experts.function import ExpertActivation, Unknown
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.naming import ROLES, Role
from quarkconv.kernels import fused_experts_int8
from quarkconv.load.experts import FusedExperts, Projection
from quarkconv.verify.bounds import NOISE_SAMPLES, exact_bound, noise_bound
from quarkconv.verify.inputs import RecordedInputs, plain_inputs, random_inputs
from quarkconv.verify.layer_results import Distance, LayerNumbers
from quarkconv.verify.reference import float_forward, reference_forwards
from quarkconv.verify.router import Router, choose_experts
from quarkconv.verify.unquantized import Weight


@dataclass(frozen=True, slots=True)
class CheckedLayer:
    """A layer that is loaded and ready to be computed.

    Attributes:
        layer: the layer.
        experts: its experts, on the device where it is computed.
        activation: the activation function of the experts.
        top_k: experts per token in the config.
        router: the model's own router, or why it is not known.
        source: the same experts of the source, on the same device; the references are then built from them.
        unquantized: gives the unquantized weight of a projection, float64 [out, in] on the same device.
    """

    layer: MoELayer
    experts: FusedExperts
    activation: ExpertActivation
    top_k: int | None
    router: Router | Unknown
    source: FusedExperts | None = None
    unquantized: Weight | None = None


def compute_numbers(
    checked: CheckedLayer, *, tokens: int, seed: int, recorded: RecordedInputs | None
) -> tuple[LayerNumbers, tuple[int, ...]]:
    """Run one layer with one number of tokens, and compare.

    Args:
        checked: the layer.
        tokens: number of random tokens; some are added to reach every expert.
        seed: of the random tokens.
        recorded: hidden states to use instead of random ones.

    Returns:
        The numbers, and how many tokens the routing sent to each of the E experts.
    """
    started = time.perf_counter()
    layer, experts, activation = checked.layer, checked.experts, checked.activation
    device = experts.w13.device
    on_input = isinstance(checked.router, Router) and checked.router.routing.on_input
    inputs = random_inputs(experts, tokens, seed) if recorded is None else recorded.inputs(layer, tokens, device)
    weights, ids, routing = choose_experts(checked.router, layer, checked.top_k, inputs.states, seed)
    load = torch.bincount(ids[ids >= 0], minlength=experts.experts).cpu()
    hidden_states, weights, ids = _reach_every_expert(experts, inputs.states, weights, ids, seed)
    result = _int8_forward(experts, hidden_states, weights, ids, activation, on_input=on_input)
    read = _remembering((checked.source or experts).projection)
    references = reference_forwards(
        hidden_states, weights, ids, read, activation, on_input=on_input, samples=NOISE_SAMPLES, seed=seed
    )
    with_outliers = torch.zeros(len(hidden_states), dtype=torch.bool, device=device)
    with_outliers[inputs.plain : len(inputs.states)] = True
    unquantized = None
    if checked.unquantized is not None:
        expected = float_forward(
            hidden_states, weights, ids, checked.unquantized, activation, bias=_biases(experts), on_input=on_input
        )
        unquantized = distance(result[~with_outliers], expected[~with_outliers], math.inf)

    def from_dequantized(rows: Tensor) -> Distance:
        return distance(result[rows], references.dequantized[rows], noise_bound(references, rows))

    numbers = LayerNumbers(
        layer=layer.index,
        module=layer.prefix,
        tokens=tokens,
        inputs=inputs.description,
        experts=experts.experts,
        reached=len(torch.unique(ids[ids >= 0])),
        routing=routing,
        activation=activation.describe(),
        exact=distance(result, references.exact, exact_bound(references)),
        dequantized=from_dequantized(~with_outliers),
        outliers=from_dequantized(with_outliers) if with_outliers.any() else None,
        unquantized=unquantized,
        seconds=time.perf_counter() - started,
    )
    return numbers, tuple(load.tolist())


def _int8_forward(
    experts: FusedExperts,
    hidden_states: Tensor,
    weights: Tensor,
    ids: Tensor,
    activation: ExpertActivation,
    *,
    on_input: bool,
) -> Tensor:
    """The INT8 forward of the kernels, float64 [M, H].

    Args:
        experts: the experts.
        hidden_states: BF16 [M, H].
        weights, ids: of the router, [M, k].
        activation: the activation function of the experts.
        on_input: the weights multiply the inputs of the experts, not their outputs.
    """
    result = fused_experts_int8(
        hidden_states,
        experts.w13,
        experts.w2,
        experts.w13_scale,
        experts.w2_scale,
        weights,
        ids,
        activation=activation.name,
        activation_limit=_limit(activation),
        activation_alpha=_alpha(activation),
        w13_input_scale=experts.w13_input_scale,
        w2_input_scale=experts.w2_input_scale,
        w13_bias=experts.w13_bias,
        w2_bias=experts.w2_bias,
        apply_router_weight_on_input=on_input,
    )
    return result.double()


def backend_name(device: torch.device) -> str:
    """The implementation of the INT8 forward on a device, for people."""
    from quarkconv.kernels.backend import uses_triton

    return "triton" if uses_triton(device) else "torch, exact integer sums"


def unsupported_activation(activation: ExpertActivation) -> str | None:
    """The reason why the kernels cannot compute an activation; None where they can."""
    from quarkconv.kernels.activations import make_activation

    try:
        make_activation(activation.name, _limit(activation), _alpha(activation))
    except ValueError:
        return f"quarkconv's INT8 forward does not compute {activation.describe()}"
    return None


def _limit(activation: ExpertActivation) -> float | None:
    """The limit as the kernels take it: of situ its linear beta."""
    return activation.linear_beta if activation.name == "situ" else activation.limit


def _alpha(activation: ExpertActivation) -> float | None:
    """The slope as the kernels take it: of situ its beta."""
    return activation.beta if activation.name == "situ" else activation.alpha


def distance(result: Tensor, reference: Tensor, bound: float) -> Distance:
    """How far two outputs [M, H] are from one another; ``bound`` is that of the relative error."""
    difference = result - reference
    noise, signal = difference.norm().item(), reference.norm().item()
    relative = noise / signal if signal else (0.0 if noise == 0 else math.inf)
    both = result.norm().item() * signal
    cosine = (result * reference).sum().item() / both if both else math.nan
    rms = signal / math.sqrt(reference.numel()) if reference.numel() else 1.0
    largest = difference.abs().max().item() / rms if rms else math.inf
    snr = -20 * math.log10(relative) if 0 < relative < math.inf else None
    return Distance(relative, cosine, snr, largest, bound)


def _reach_every_expert(
    experts: FusedExperts, hidden_states: Tensor, weights: Tensor, ids: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Add tokens for the experts that the routing left out, so that every expert is computed."""
    top_k = ids.shape[1]
    present = torch.zeros(experts.experts, dtype=torch.bool, device=ids.device)
    present[ids[ids >= 0]] = True
    missing = torch.nonzero(~present).flatten()
    if len(missing) == 0:
        return hidden_states, weights, ids
    others = torch.nonzero(present).flatten()
    order = torch.cat([missing, others])  # rows of distinct experts; the last row is filled up with present ones
    extra = -(-len(missing) // top_k)
    extra_ids = order[: extra * top_k].reshape(extra, top_k)
    extra_states = plain_inputs(experts, extra, seed + 1)
    extra_weights = torch.full((extra, top_k), 1.0 / top_k, device=weights.device)
    return (
        torch.cat([hidden_states, extra_states]),
        torch.cat([weights, extra_weights]).contiguous(),
        torch.cat([ids, extra_ids]).contiguous(),
    )


def _biases(experts: FusedExperts) -> Callable[[Role, int], Tensor] | None:
    """Gives the bias of a projection, float64 [out], which quantization leaves as it was; None without biases."""
    if experts.w13_bias is None:
        return None

    def bias(role: Role, expert: int) -> Tensor:
        found = experts.projection(role, expert).bias
        assert found is not None
        return found.double()

    return bias


def _remembering(read: Callable[[Role, int], Projection]) -> Callable[[Role, int], Projection]:
    """Both references use an expert in sequence; only the last one is kept, to save memory."""
    last: dict[tuple[Role, int], Projection] = {}

    def reading(role: Role, expert: int) -> Projection:
        if (role, expert) not in last:
            if len(last) >= len(ROLES):
                last.clear()
            last[role, expert] = read(role, expert)
        return last[role, expert]

    return reading
