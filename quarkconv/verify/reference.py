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
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    read: Read,
    activation: ExpertActivation,
    *,
    on_input: bool = False,
) -> Tensor:
    """The INT8 forward, exactly. Arguments as :func:`both_forwards`; returns [M, H] in their dtype."""
    expert = _exact_expert(read, activation, hidden_states.dtype)
    (output,) = _combine(hidden_states, topk_weights, topk_ids, [expert], on_input=on_input)
    return output.to(hidden_states.dtype)


def dequantized_forward(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    read: Read,
    activation: ExpertActivation,
    *,
    on_input: bool = False,
) -> Tensor:
    """The forward with dequantized weights and activations that are not rounded.

    Arguments as :func:`both_forwards`; returns float64 [M, H].
    """
    expert = _dequantized_expert(read, activation)
    (output,) = _combine(hidden_states, topk_weights, topk_ids, [expert], on_input=on_input)
    return output


def both_forwards(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    read: Read,
    activation: ExpertActivation,
    *,
    on_input: bool = False,
) -> tuple[Tensor, Tensor]:
    """Both references, reading each expert once.

    Args:
        hidden_states: [M, H], bfloat16 or float16.
        topk_weights: float32 [M, k].
        topk_ids: int64 [M, k]; those below 0 are of no expert here.
        read: gives the projections of an expert; no gate is read where the activation has none.
        activation: what stands between the two products.
        on_input: the weights multiply the experts' inputs and not their outputs.

    Returns:
        :func:`exact_forward`, :func:`dequantized_forward`.
    """
    experts = [_exact_expert(read, activation, hidden_states.dtype), _dequantized_expert(read, activation)]
    exact, dequantized = _combine(hidden_states, topk_weights, topk_ids, experts, on_input=on_input)
    return exact.to(hidden_states.dtype), dequantized


def float_forward(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weight: Callable[[Role, int], Tensor],
    activation: ExpertActivation,
    *,
    bias: Callable[[Role, int], Tensor] | None = None,
    on_input: bool = False,
) -> Tensor:
    """The forward of the model before it was quantized.

    Arguments as :func:`both_forwards`; ``weight`` gives the weight of a projection, float64 [out, in], ``bias`` its
    bias [out]. Returns float64 [M, H].
    """

    def product(x: Tensor, role: Role, number: int) -> Tensor:
        return _biased(x @ weight(role, number).T, None if bias is None else bias(role, number))

    def expert(number: int, x: Tensor, factor: Tensor | None) -> Tensor:
        wide = _weighted(x.double(), factor)
        gate = product(wide, "gate", number) if activation.gated else None
        return product(activate(gate, product(wide, "up", number), activation), "down", number)

    (output,) = _combine(hidden_states, topk_weights, topk_ids, [expert], on_input=on_input)
    return output


Expert = Callable[[int, Tensor, Tensor | None], Tensor]
"""(number, its tokens [m, H], factors of these [m, 1] or None) -> its output, float64 [m, H]."""


def _exact_expert(read: Read, activation: ExpertActivation, dtype: torch.dtype) -> Expert:
    def product(x: Tensor, projection: Projection, factor: Tensor | None = None) -> Tensor:
        # Codes of a row do not change with a factor of the row, under a scale of its own. A static scale sees it.
        dynamic = projection.input_scale is None
        codes, scale = quantize(x if dynamic else _weighted(x.float(), factor), projection.input_scale)
        scale = _weighted(scale, factor) if dynamic else scale
        # A product of codes is at most 127^2, so sums of 2^39 of them are exact in float64.
        sums = codes @ projection.codes.to(x.device).double().T
        return _biased(sums * scale * projection.scale.to(x.device).double(), projection.bias)

    def expert(number: int, x: Tensor, factor: Tensor | None) -> Tensor:
        gate = product(x, read("gate", number), factor) if activation.gated else None
        hidden = activate(gate, product(x, read("up", number), factor), activation).to(dtype)
        return product(hidden, read("down", number)).to(dtype).double()

    return expert


def _dequantized_expert(read: Read, activation: ExpertActivation) -> Expert:
    def product(x: Tensor, projection: Projection) -> Tensor:
        if projection.input_scale is not None:
            limit = CODE_MAX * projection.input_scale.item()
            x = x.clamp(-limit, limit)
        return _biased(x @ projection.dequantized(torch.float64, x.device).T, projection.bias)

    def expert(number: int, x: Tensor, factor: Tensor | None) -> Tensor:
        wide = _weighted(x.double(), factor)
        gate = product(wide, read("gate", number)) if activation.gated else None
        return product(activate(gate, product(wide, read("up", number)), activation), read("down", number))

    return expert


def activate(gate: Tensor | None, up: Tensor, activation: ExpertActivation) -> Tensor:
    """What stands between the two products, in the dtype of its arguments: see :class:`ExpertActivation`.

    ``gate`` is None for experts that have none.
    """
    name, limit = activation.name, activation.limit
    if gate is None:
        return up.clamp(min=0).square()
    if name == "situ":
        assert activation.beta is not None
        if activation.linear_beta is not None:
            up = activation.linear_beta * torch.tanh(up / activation.linear_beta)
        return activation.beta * torch.tanh(gate / activation.beta) * torch.sigmoid(gate) * up
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none") * up
    if limit is not None:
        up = up.clamp(-limit, limit)
        if name != "swiglustep":
            gate = gate.clamp(max=limit)
    if name == "swigluoai":
        assert activation.alpha is not None
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    gated = gate * torch.sigmoid(gate)
    if name == "swiglustep" and limit is not None:
        gated = gated.clamp(max=limit)
    return gated * up


def _weighted(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor.to(x.dtype)


def _biased(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.device).double()


def _combine(
    hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, experts: list[Expert], *, on_input: bool = False
) -> list[Tensor]:
    """For each way to compute an expert: the sum over each token's experts, weighted by the router.

    With ``on_input`` the weights multiply the experts' inputs and not their outputs.
    """
    outputs = [torch.zeros_like(hidden_states, dtype=torch.float64) for _ in experts]
    for number, tokens, slots in _assignments(topk_ids):
        weight = topk_weights[tokens, slots].double().unsqueeze(1)
        for output, expert in zip(outputs, experts, strict=True):
            result = expert(number, hidden_states[tokens], weight if on_input else None)
            output.index_add_(0, tokens, result if on_input else weight * result)
    return outputs


def _assignments(topk_ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, their slots) for every expert that has any; ids below 0 are of no expert here."""
    for number in torch.unique(topk_ids[topk_ids >= 0]).tolist():
        tokens, slots = torch.nonzero(topk_ids == number, as_tuple=True)
        yield number, tokens, slots
