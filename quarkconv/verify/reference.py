"""Two references for the INT8 forward, in float64, that share no code with it.

Shapes: M tokens, H hidden size, I intermediate size, E experts, k experts per token.

The exact result follows the arithmetic of the format step by step: activations quantized per token (or by a static
scale), products of codes summed as integers, scales applied to the sums. Every step is exact or in float64, except the
roundings that belong to the format: codes are computed in float32, and the results of both products and the sum over
experts are rounded to the dtype of the hidden states. An INT8 kernel can differ from it only where its float32 epilogue
falls on the other side of such a rounding.

The dequantized result is the model as quantization left it: weights code * scale, activations not rounded at all,
though cut off where a static scale cuts them off. The distance to it is the noise of 8-bit activations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quarkconv.experts.function import ExpertActivation
from quarkconv.experts.naming import Role
from quarkconv.load.experts import Projection
from quarkconv.verify.activation import FLOAT32_STEP, activate, float32_error

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


@dataclass(frozen=True, slots=True)
class References:
    """References for the INT8 forward. All tensors are float64 [M, H].

    Attributes:
        exact: the INT8 forward, exactly, rounded to the dtype of the hidden states.
        tolerance: how far an element of an INT8 forward in float32 may be from ``exact``: what changes where its error
            decides a rounding.
        dequantized: dequantized weights, and activations that are not rounded.
        noisy: the same with simulated noise of 8 bits on the activations, several times.
    """

    exact: Tensor
    tolerance: Tensor
    dequantized: Tensor
    noisy: tuple[Tensor, ...]


def reference_forwards(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    read: Read,
    activation: ExpertActivation,
    *,
    on_input: bool = False,
    samples: int = 0,
    seed: int = 0,
) -> References:
    """All references, reading each expert once.

    Args:
        hidden_states: [M, H], bfloat16 or float16.
        topk_weights: float32 [M, k].
        topk_ids: int64 [M, k]; those below 0 are of no expert here.
        read: gives the projections of an expert; gates are read only for gated activations.
        activation: the activation function.
        on_input: the weights multiply the experts' inputs and not their outputs.
        samples: how many times the noise of 8 bits is simulated.
        seed: of that noise.
    """
    dtype, shape, device = hidden_states.dtype, hidden_states.shape, hidden_states.device
    random = torch.Generator().manual_seed(seed)
    uniform = torch.rand(samples, *shape, generator=random).to(device) - 0.5
    exact, tolerance, magnitude = (torch.zeros(shape, dtype=torch.float64, device=device) for _ in range(3))
    floats = torch.zeros(1 + samples, *shape, dtype=torch.float64, device=device)
    for number, tokens, slots in _assignments(topk_ids):
        weight = topk_weights[tokens, slots].double().unsqueeze(1)
        factor, outer = (weight, torch.ones_like(weight)) if on_input else (None, weight)
        x = hidden_states[tokens]
        output, allowed = _exact_expert(x, factor, number, read, activation)
        exact.index_add_(0, tokens, outer * output)
        magnitude.index_add_(0, tokens, (outer * output).abs())
        tolerance.index_add_(0, tokens, outer.abs() * allowed)
        results = _dequantized_expert(x, factor, number, read, activation, uniform[:, tokens], random)
        for total, result in zip(floats, results, strict=True):
            total.index_add_(0, tokens, outer * result)
    rounded = exact.to(dtype).double()
    sum_error = (topk_ids.shape[1] + 2) * FLOAT32_STEP * magnitude
    tolerance = _rounded_tolerance(exact, tolerance, sum_error, dtype)
    return References(rounded, tolerance, floats[0], tuple(floats[1:]))


def float_forward(
    hidden_states: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    weight: Callable[[Role, int], Tensor],
    activation: ExpertActivation,
    *,
    bias: Callable[[Role, int], Tensor] | None,
    on_input: bool,
) -> Tensor:
    """The forward of the model before it was quantized.

    Arguments as :func:`reference_forwards`; ``weight`` gives the weight of a projection, float64 [out, in], ``bias``
    its bias [out]. Returns float64 [M, H].
    """

    def product(x: Tensor, role: Role, number: int) -> Tensor:
        return _biased(x @ weight(role, number).T, None if bias is None else bias(role, number))

    output = torch.zeros_like(hidden_states, dtype=torch.float64)
    for number, tokens, slots in _assignments(topk_ids):
        factor = topk_weights[tokens, slots].double().unsqueeze(1)
        wide = hidden_states[tokens].double() * (factor if on_input else 1)
        gate = product(wide, "gate", number) if activation.gated else None
        result = product(activate(gate, product(wide, "up", number), activation), "down", number)
        output.index_add_(0, tokens, result if on_input else factor * result)
    return output


def _exact_expert(
    x: Tensor, factor: Tensor | None, number: int, read: Read, activation: ExpertActivation
) -> tuple[Tensor, Tensor]:
    """One expert on its tokens x [m, H], with their factors [m, 1]: its output and the tolerance of that, [m, H]."""
    gate = None if not activation.gated else _integer_product(x, factor, read("gate", number))
    up, down = _integer_product(x, factor, read("up", number)), read("down", number)
    hidden = activate(gate, up, activation)
    rounded = hidden.to(x.dtype)
    output = _integer_product(rounded, None, down)
    tolerance = _hidden_tolerance(hidden, rounded, float32_error(gate, up, hidden, activation), down)
    output_error = 4 * FLOAT32_STEP * output.abs()
    tolerance = _rounded_tolerance(output, tolerance, output_error, x.dtype)
    return output.to(x.dtype).double(), tolerance


def _integer_product(x: Tensor, factor: Tensor | None, projection: Projection) -> Tensor:
    # Codes of a row do not change with a factor of the row, under a scale of its own. A static scale sees it.
    dynamic = projection.input_scale is None
    codes, scale = quantize(x if dynamic else _weighted(x.float(), factor), projection.input_scale)
    scale = _weighted(scale, factor) if dynamic else scale
    # A product of codes is at most 127^2, so sums of 2^39 of them are exact in float64.
    sums = codes @ projection.codes.to(x.device).double().T
    return _biased(sums * scale * projection.scale.to(x.device).double(), projection.bias)


def _hidden_tolerance(hidden: Tensor, rounded: Tensor, error: Tensor, down: Projection) -> Tensor:
    """How far the product of down may be, float64 [m, H], where the error of its input decides roundings.

    An element of h close to the middle between two values of its dtype may be rounded to either. Mostly its code is the
    same; where not, the product differs by a step times a column of the weight. Where it is the largest of its row,
    the row gets another scale, and all of its codes are rounded again.
    """
    low, high = (hidden - error).to(rounded.dtype), (hidden + error).to(rounded.dtype)
    tolerance = torch.zeros(len(hidden), len(down.codes), dtype=torch.float64, device=hidden.device)
    rows = torch.nonzero((low != high).any(dim=1)).flatten()
    if len(rows) == 0:
        return tolerance
    grows = high.abs() > low.abs()
    large, small = torch.where(grows, high, low)[rows], torch.where(grows, low, high)[rows]
    weight = down.dequantized(torch.float64, hidden.device)
    codes, scale = quantize(rounded[rows], down.input_scale)
    large_codes, large_scale = quantize(large, down.input_scale)
    small_codes, small_scale = quantize(small, down.input_scale)
    # Under either scale: elements whose code depends on the rounding.
    for step in (large_scale, small_scale):
        codes_of = [(value.float() / step.float()).round().clamp(-CODE_MAX, CODE_MAX) for value in (large, small)]
        flips = (codes_of[0] - codes_of[1]).abs().double() * step
        tolerance[rows] = torch.maximum(tolerance[rows], flips @ weight.abs().T)
    rescaled = (large_scale != scale) | (small_scale != scale)
    for other, step in ((large_codes, large_scale), (small_codes, small_scale)):
        change = torch.where(rescaled, other * step - codes * scale, 0.0)
        tolerance[rows] += (change @ weight.T).abs()
    return tolerance


def _rounded_tolerance(value: Tensor, tolerance: Tensor, error: Tensor, dtype: torch.dtype) -> Tensor:
    """The tolerance of a value that is rounded to a dtype: of an element that differs already, a step more; of the
    others, what the error of float32 changes."""
    decided = ((value + error).to(dtype).double() - (value - error).to(dtype).double()).abs()
    return torch.where(tolerance > 0, tolerance + torch.finfo(dtype).eps * value.abs(), decided)


def _dequantized_expert(
    x: Tensor,
    factor: Tensor | None,
    number: int,
    read: Read,
    activation: ExpertActivation,
    uniform: Tensor,
    random: torch.Generator,
) -> Tensor:
    """One expert on its tokens x [m, H] in float64, without noise and with it: [1 + samples, m, H].

    ``uniform`` [samples, m, H], within half of one: the noise of its input in steps. That of down is drawn here.
    """
    samples = len(uniform)

    def product(inputs: Tensor, projection: Projection) -> Tensor:
        return _biased(inputs @ projection.dequantized(torch.float64, x.device).T, projection.bias)

    wide = _weighted(x.double(), factor)
    none = torch.zeros_like(wide).unsqueeze(0)
    up = read("up", number)
    noise = torch.cat([none, uniform.double()])
    inputs = _noisy(wide.expand(1 + samples, *wide.shape), up.input_scale, noise)
    gate = product(inputs, read("gate", number)) if activation.gated else None
    hidden = activate(gate, product(inputs, up), activation)
    down = read("down", number)
    drawn = torch.rand(samples, *hidden.shape[1:], generator=random).to(x.device).double() - 0.5
    noise = torch.cat([torch.zeros_like(hidden[:1]), drawn])
    return product(_noisy(hidden, down.input_scale, noise), down)


def _noisy(values: Tensor, static_scale: Tensor | None, noise: Tensor) -> Tensor:
    """Values, cut off where a static scale cuts them off, plus noise in steps of their codes."""
    if static_scale is None:
        return values + noise * (values.abs().amax(dim=-1, keepdim=True) / CODE_MAX)
    step = static_scale.to(values.device).double()
    return values.clamp(-CODE_MAX * step, CODE_MAX * step) + noise * step


def _weighted(x: Tensor, factor: Tensor | None) -> Tensor:
    return x if factor is None else x * factor.to(x.dtype)


def _biased(product: Tensor, bias: Tensor | None) -> Tensor:
    return product if bias is None else product + bias.to(product.device).double()


def _assignments(topk_ids: Tensor) -> Iterator[tuple[int, Tensor, Tensor]]:
    """(expert, its tokens, their slots) for every expert that has any; ids below 0 are of no expert here."""
    for number in torch.unique(topk_ids[topk_ids >= 0]).tolist():
        tokens, slots = torch.nonzero(topk_ids == number, as_tuple=True)
        yield number, tokens, slots
