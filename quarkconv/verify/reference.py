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
from quarkconv.verify.activation import ExpertActivation
from quarkconv.verify.loading import Projection

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
        scale = (wide.abs().amax(dim=1, keepdim=True) / CODE_MAX).clamp(min=MIN_SCALE)
    else:
        scale = static_scale.to(x.device).float().expand(len(x), 1)
    return torch.round(wide / scale).clamp(-CODE_MAX, CODE_MAX).double(), scale.double()


def exact_forward(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, read: Read, activation: ExpertActivation
) -> Tensor:
    """The INT8 forward, exactly. Arguments as :func:`dequantized_forward`; returns [M, H] in their dtype."""
    dtype = hidden_states.dtype

    def product(x: Tensor, projection: Projection) -> Tensor:
        codes, scale = quantize(x, projection.input_scale)
        # Codes are at most 127, so a sum of products is an integer below 2^53 / 127^2 terms: float64 is exact.
        sums = codes @ projection.codes.to(x.device, torch.float64).T
        return sums * scale * projection.scale.to(x.device, torch.float64)

    def expert(number: int, x: Tensor) -> Tensor:
        gate, up = product(x, read("gate", number)), product(x, read("up", number))
        hidden = activate(gate, up, activation).to(dtype)
        return product(hidden, read("down", number)).to(dtype).double()

    return _combine(hidden_states, topk_weights, topk_ids, expert).to(dtype)


def dequantized_forward(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, read: Read, activation: ExpertActivation
) -> Tensor:
    """The forward with dequantized weights and activations that are not rounded, in float64.

    Args:
        hidden_states: [M, H], bfloat16 or float16.
        topk_weights: float32 [M, k].
        topk_ids: int64 [M, k].
        read: gives the projections of an expert.
        activation: the gated activation.

    Returns:
        float64 [M, H].
    """

    def product(x: Tensor, projection: Projection) -> Tensor:
        if projection.input_scale is not None:
            limit = CODE_MAX * projection.input_scale.item()
            x = x.clamp(-limit, limit)
        return x @ projection.dequantized(torch.float64, x.device).T

    def expert(number: int, x: Tensor) -> Tensor:
        gate, up = product(x.double(), read("gate", number)), product(x.double(), read("up", number))
        return product(activate(gate, up, activation), read("down", number))

    return _combine(hidden_states, topk_weights, topk_ids, expert)


def activate(gate: Tensor, up: Tensor, activation: ExpertActivation) -> Tensor:
    """The gated activation, in the dtype of its arguments."""
    if activation.name == "gelu_tanh":
        return F.gelu(gate, approximate="tanh") * up
    gated = gate * torch.sigmoid(gate)
    if activation.limit is not None:  # Step-3.5: the activated gate is cut above, up on both sides
        gated, up = gated.clamp(max=activation.limit), up.clamp(-activation.limit, activation.limit)
    return gated * up


def _combine(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, expert: Callable[[int, Tensor], Tensor]
) -> Tensor:
    """Sum over each token's experts, weighted by the router; one expert at a time."""
    output = torch.zeros(hidden_states.shape, dtype=torch.float64, device=hidden_states.device)
    for number, tokens, slots in _assignments(topk_ids):
        weight = topk_weights[tokens, slots].double().unsqueeze(1)
        output.index_add_(0, tokens, weight * expert(number, hidden_states[tokens]))
    return output


def _assignments(topk_ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, their slots) for every expert that has any."""
    for number in torch.unique(topk_ids).tolist():
        tokens, slots = torch.nonzero(topk_ids == number, as_tuple=True)
        yield number, tokens, slots
