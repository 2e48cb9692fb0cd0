"""One layer in ``verify``: from its experts in memory to its numbers and problems.

The sequence of :func:`check_layer`: scales, codes and scales of the source, the model's own router, the forwards for
each number of tokens, the weights of the unquantized model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import inf
from typing import Final

import torch

from quarkconv.experts.function import ExpertActivation, Unknown
from quarkconv.experts.layer import MoELayer
from quarkconv.load.experts import FusedExperts, Projection
from quarkconv.verify.inputs import RecordedInputs
from quarkconv.verify.layer_results import SCALE_EDGES, LayerExperts, LayerNumbers
from quarkconv.verify.numbers import CheckedLayer, compute_numbers
from quarkconv.verify.results import Problem
from quarkconv.verify.router import Router
from quarkconv.verify.unquantized import WEIGHT_BOUND, Weight, WeightCheck, check_weights

ROUTER_BOUND: Final = 2.0**-6
"""Bound on the relative error of a router with factors: it is rounded to bfloat16 again, by 2^-8 at most."""


@dataclass(frozen=True, slots=True)
class LayerInputs:
    """The inputs of a layer beside its experts.

    Attributes:
        layer: the layer.
        activation: the activation function of its experts; Unknown leaves the forwards out.
        router: the model's own router, or why it is not known.
        top_k: experts per token in the config.
        tokens, seed: of the random hidden states.
        recorded: hidden states to use instead of random ones.
        unquantized: gives the unquantized weights.
        unquantized_router: the router of the unquantized model, or why it is not known.
    """

    layer: MoELayer
    activation: ExpertActivation | Unknown
    router: Router | Unknown
    top_k: int | None
    tokens: tuple[int, ...]
    seed: int
    recorded: RecordedInputs | None = None
    unquantized: Weight | None = None
    unquantized_router: Router | Unknown | None = None


@dataclass(frozen=True, slots=True)
class LayerOutcome:
    """The numbers of a layer, one for each number of tokens; its experts; its problems."""

    numbers: tuple[LayerNumbers, ...]
    experts: LayerExperts
    problems: tuple[Problem, ...]


def check_layer(
    inputs: LayerInputs, experts: FusedExperts, source: FusedExperts | None, done: Callable[[LayerNumbers], None]
) -> LayerOutcome:
    """Check one layer.

    Args:
        inputs: the layer.
        experts: its experts, on the device where it is computed.
        source: the same experts of the source, on the same device; the references are then built from them.
        done: called with the numbers of each number of tokens.
    """
    problems = list(_scale_problems(experts))
    if source is not None:
        problems += _source_problems(experts, source)
    router = inputs.router
    if isinstance(router, Router) and not router.is_finite():
        message = "The router's tensors are not finite, so no token would reach an expert"
        problems.append(Problem("numbers", experts.layer, inputs.layer.moe, message))
        router = Unknown("its tensors are not finite")  # the experts are checked anyway
    weights = None if inputs.unquantized is None else check_weights(experts, inputs.unquantized)
    if weights is not None:
        problems += [*weights.problems, *_router_problems(inputs, router, weights)]
    numbers: list[LayerNumbers] = []
    load: tuple[int, ...] = ()
    if isinstance(inputs.activation, ExpertActivation):
        outputs = None if weights is None else weights.outputs
        checked = CheckedLayer(inputs.layer, experts, inputs.activation, inputs.top_k, router, source, outputs)
        for tokens in inputs.tokens:
            computed, load = compute_numbers(checked, tokens=tokens, seed=inputs.seed, recorded=inputs.recorded)
            numbers.append(computed)
            problems += _numbers_problems(computed)
            done(computed)
    return LayerOutcome(tuple(numbers), _seen(experts, load, weights), tuple(problems))


def _scale_problems(experts: FusedExperts) -> Iterator[Problem]:
    """Scales that are zero or not finite. A scale of 0 is harmless where all codes of its row are 0."""
    for name, scale, codes in (
        ("w13 scale", experts.w13_scale, experts.w13),
        ("w2 scale", experts.w2_scale, experts.w2),
    ):
        bad = ~(torch.isfinite(scale) & (scale != 0)).flatten(1)
        bad &= ~((scale == 0).flatten(1) & ~codes.any(dim=2)) if bool(bad.any()) else bad
        wrong = torch.nonzero(bad.any(dim=1)).flatten().tolist()
        if wrong:
            message = f"The {name} of expert {wrong[0]} has values that are zero or not finite"
            yield Problem("numbers", experts.layer, experts.module, message, len(wrong))


def _source_problems(experts: FusedExperts, source: FusedExperts) -> Iterator[Problem]:
    """Codes, scales and biases that differ from the source's, by expert and projection."""
    for expert in range(experts.experts):
        for role in experts.roles:
            converted, original = experts.projection(role, expert), source.projection(role, expert)
            part = _difference(converted, original)
            if part is not None:
                name = f"{experts.module}.{expert} ({role})"
                yield Problem("numbers", experts.layer, name, f"The {part} from the source's")


def _difference(converted: Projection, original: Projection) -> str | None:
    """The first part of a projection that differs; None where all are equal."""
    if not torch.equal(converted.codes, original.codes):
        return "codes differ"
    if not torch.equal(converted.scale, original.scale):
        return "scale differs"
    biases = [torch.zeros(1) if bias is None else bias.cpu() for bias in (converted.bias, original.bias)]
    return None if torch.equal(*biases) else "bias differs"


def _numbers_problems(numbers: LayerNumbers) -> Iterator[Problem]:
    if numbers.is_zero:
        yield Problem("numbers", numbers.layer, numbers.module, "The output of the layer is zero for every token")
    for name, distance in (
        ("the exact INT8 reference", numbers.exact),
        ("the dequantized reference", numbers.dequantized),
        ("the dequantized reference with outliers in its inputs", numbers.outliers),
    ):
        if distance is not None and not distance.ok:
            message = (
                f"The INT8 forward differs from {name}: relative error {distance.relative_error:.3g}, "
                f"bound {distance.bound:.3g}"
            )
            yield Problem("numbers", numbers.layer, numbers.module, message)


def _router_problems(inputs: LayerInputs, router: Router | Unknown, weights: WeightCheck) -> Iterator[Problem]:
    """A router of another model. Where the input channels have factors, the router must have them as well."""
    original = inputs.unquantized_router
    if not isinstance(router, Router) or not isinstance(original, Router):
        return
    if weights.inputs is None:
        yield from _other_router(inputs.layer, router, original)
        return
    expected = original.weight.double() * weights.inputs.cpu()
    error = (router.weight.double() - expected).norm() / expected.norm()
    if not error <= ROUTER_BOUND:
        message = (
            "The experts' input channels have factors, as SmoothQuant and AWQ leave them, but the router does not: "
            f"relative error {error:.3g}, bound {ROUTER_BOUND:g}"
        )
        yield Problem("numbers", inputs.layer.index, inputs.layer.moe, message)


def _other_router(layer: MoELayer, router: Router, original: Router) -> Iterator[Problem]:
    """The tensors of a router that are not those of the unquantized model.

    Factors on its input are not looked for here, and may be as small as those that experts' weights may have.
    """
    for found, expected in zip(router.tensors(), original.tensors(), strict=False):
        same = found.shape == expected.shape
        error = (found.double() - expected.double()).norm() / expected.double().norm().clamp(min=1e-30) if same else inf
        if not error <= WEIGHT_BOUND:
            message = (
                f"The router is not the unquantized model's: relative error {float(error):.3g}, bound {WEIGHT_BOUND:g}"
            )
            yield Problem("numbers", layer.index, layer.moe, message)
            return


def _seen(experts: FusedExperts, load: tuple[int, ...], weights: WeightCheck | None) -> LayerExperts:
    scales = torch.cat([experts.w13_scale.flatten(1), experts.w2_scale.flatten(1)], dim=1).abs().cpu()
    powers = scales.clamp(min=10.0 ** SCALE_EDGES[0]).log10().nan_to_num(SCALE_EDGES[0])
    counts = torch.histc(powers, len(SCALE_EDGES) - 1, SCALE_EDGES[0], SCALE_EDGES[-1])
    used = torch.where(scales > 0, scales, scales.amax(dim=1, keepdim=True))  # rows of zeros may have a scale of 0
    low, high = used.min(dim=1).values.tolist(), scales.max(dim=1).values.tolist()
    return LayerExperts(
        experts.layer,
        experts.module,
        load,
        tuple(low),
        tuple(high),
        tuple(map(int, counts.tolist())),
        {} if weights is None else weights.errors,
        weights is not None and weights.rescaled,
    )
