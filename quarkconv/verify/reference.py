"""What the INT8 forward must compute, twice over, in float64, without any of the code that computes it.

Shapes: M tokens, H hidden size, I intermediate size, E experts, k experts per token.

:func:`exact_forward` follows the arithmetic of the format step by step: activations quantized per token (or by a static
scale), products of codes summed as integers, scales applied to the sums. Every step is exact or in float64, except the
roundings that belong to the format: codes are computed in float32, and the results of both products and the sum over
experts are rounded to the dtype of the hidden states. An INT8 kernel can differ from it only where its float32 epilogue
falls on the other side of such a rounding.

:func:`dequantized_forward` is the model as quantization left it: weights code * scale, activations not rounded at all,
though cut off where a static scale cuts them off. The distance to it is the noise of 8-bit activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from quarkconv.experts.naming import Role
from quarkconv.load.experts import Projection
from quarkconv.verify.activation import ExpertActivation

CODE_MAX: Final = 127
MIN_SCALE: Final = torch.finfo(torch.float32).tiny

Read = Callable[[Role, int], Projection]
"""(role, expert) -> that projection."""


def quantize(x: Tensor, static_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Codes and scale of activations, as the format defines them.

    Args:
        x: [M, N], any floating dtype.
        static_scale: scalar, or None for one scale per row: its largest magnitude over 127.

    Returns:
        codes, float64 [M, N] holding integers in [-127, 127], rounded half to even; scale, float64 [M, 1].
    """
    wide = x.float()
    if static_scale is None:
        # A tensor as divisor: torch divides by a number on a GPU by multiplying with its reciprocal, which is not the
        # same, and decides the codes of values halfway between two.
        largest = wide.abs().amax(dim=1, keepdim=True)
        scale = (largest / torch.full_like(largest, CODE_MAX)).clamp(min=MIN_SCALE)
    else:
        scale = static_scale.to(x.device).float().expand(len(x), 1)
    return torch.round(wide / scale).clamp(-CODE_MAX, CODE_MAX).double(), scale.double()


def exact_forward(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, read: Read, activation: ExpertActivation
) -> Tensor:
    """The INT8 forward, exactly. Arguments as :func:`both_forwards`; returns [M, H] in their dtype."""
    expert = _exact_expert(read, activation, hidden_states.dtype)
    (output,) = _combine(hidden_states, topk_weights, topk_ids, [expert])
    return output.to(hidden_states.dtype)


def dequantized_forward(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, read: Read, activation: ExpertActivation
) -> Tensor:
    """The forward with dequantized weights and activations that are not rounded.

    Arguments as :func:`both_forwards`; returns float64 [M, H].
    """
    (output,) = _combine(hidden_states, topk_weights, topk_ids, [_dequantized_expert(read, activation)])
    return output


def both_forwards(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, read: Read, activation: ExpertActivation
) -> tuple[Tensor, Tensor]:
    """Both references, reading each expert once.

    Args:
        hidden_states: [M, H], bfloat16 or float16.
        topk_weights: float32 [M, k].
        topk_ids: int64 [M, k].
        read: gives the projections of an expert.
        activation: the gated activation.

    Returns:
        :func:`exact_forward`, :func:`dequantized_forward`.
    """
    experts = [_exact_expert(read, activation, hidden_states.dtype), _dequantized_expert(read, activation)]
    exact, dequantized = _combine(hidden_states, topk_weights, topk_ids, experts)
    return exact.to(hidden_states.dtype), dequantized


def float_forward(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weight: Callable[[Role, int], Tensor],
    activation: ExpertActivation,
) -> Tensor:
    """The forward of the model before it was quantized.

    Arguments as :func:`both_forwards`; ``weight`` gives the weight of a projection, float64 [out, in]. Returns float64
    [M, H].
    """

    def expert(number: int, x: Tensor) -> Tensor:
        wide = x.double()
        gate, up = wide @ weight("gate", number).T, wide @ weight("up", number).T
        return activate(gate, up, activation) @ weight("down", number).T

    (output,) = _combine(hidden_states, topk_weights, topk_ids, [expert])
    return output


Expert = Callable[[int, Tensor], Tensor]
"""(number, its tokens [m, H]) -> its output, float64 [m, H]."""


def _exact_expert(read: Read, activation: ExpertActivation, dtype: torch.dtype) -> Expert:
    def product(x: Tensor, projection: Projection) -> Tensor:
        codes, scale = quantize(x, projection.input_scale)
        # A product of codes is at most 127^2, so sums of 2^39 of them are exact in float64.
        sums = codes @ projection.codes.to(x.device).double().T
        return sums * scale * projection.scale.to(x.device).double()

    def expert(number: int, x: Tensor) -> Tensor:
        gate, up = product(x, read("gate", number)), product(x, read("up", number))
        hidden = activate(gate, up, activation).to(dtype)
        return product(hidden, read("down", number)).to(dtype).double()

    return expert


def _dequantized_expert(read: Read, activation: ExpertActivation) -> Expert:
    def product(x: Tensor, projection: Projection) -> Tensor:
        if projection.input_scale is not None:
            limit = CODE_MAX * projection.input_scale.item()
            x = x.clamp(-limit, limit)
        return x @ projection.dequantized(torch.float64, x.device).T

    def expert(number: int, x: Tensor) -> Tensor:
        gate, up = product(x.double(), read("gate", number)), product(x.double(), read("up", number))
        return product(activate(gate, up, activation), read("down", number))

    return expert


def activate(gate: Tensor, up: Tensor, activation: ExpertActivation) -> Tensor:
    """The gated activation, in the dtype of its arguments."""
    if activation.name == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    gated = gate * torch.sigmoid(gate)
    if activation.limit is not None:  # Step-3.5: the activated gate is cut above, up on both sides
        gated, up = gated.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gated * up


def _combine(hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: list[Expert]) -> list[Tensor]:
    """For each way to compute an expert: the sum over each token's experts, weighted by the router."""
    outputs = [torch.zeros_like(hidden_states, dtype=torch.float64) for _ in experts]
    for number, tokens, slots in _assignments(topk_ids):
        weight = topk_weights[tokens, slots].double().unsqueeze(1)
        for output, expert in zip(outputs, experts, strict=True):
            output.index_add_(0, tokens, weight * expert(number, hidden_states[tokens]))
    return outputs


def _assignments(topk_ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, their slots) for every expert that has any."""
    for number in torch.unique(topk_ids).tolist():
        tokens, slots = torch.nonzero(topk_ids == number, as_tuple=True)
        yield number, tokens, slots
