"""The model before it was quantized: its weights beside the codes and scales, expert by expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quarkconv.description.description import Description
from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.experts.function import Unknown
from quarkconv.experts.knowledge import knowledge
from quarkconv.experts.known import Known
from quarkconv.experts.layer import MoELayer, Part
from quarkconv.experts.naming import Role
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify.layer_results import WeightError
from quarkconv.verify.published import PublishedLayer, published_layer, tensors_of
from quarkconv.verify.reference import CODE_MAX
from quarkconv.verify.rescaling import estimate_rescaling
from quarkconv.verify.results import Problem
from quarkconv.verify.router import Router, router_of

WEIGHT_BOUND: Final = 0.25
"""Bound on the relative error of a weight. Rounding to 8 bits with a scale per row gives a row whose largest value is c
times its root mean square an error of c / 440. Weights have c from 4 to about 20; the bound would take 110. A larger
error is not rounding: other weights, other scales, or rows in another order."""


Weight = Callable[[Role, int], Tensor]
"""(role, expert) -> the unquantized weight of that projection, float64 [out, in]."""


class UnquantizedModel:
    """An unquantized checkpoint, with its experts one by one, stacked, or fused. A context manager.

    Fused matrices may be [in, out], as llama4 and gpt-oss publish them, and their rows of gate and up may alternate.

    Args:
        description: the unquantized checkpoint.
        pool: threads to read with.
    """

    def __init__(self, description: Description, pool: ThreadPoolExecutor) -> None:
        self.description = description
        self._reader = LayerReader(description, pool)
        self._layers = description.moe_layers

    def __enter__(self) -> UnquantizedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self._reader.__exit__(*error)

    def check(self, layers: Sequence[MoELayer]) -> None:
        """Refuse a model that does not have these layers in these shapes, stored in float.

        Raises:
            UsageError: it lacks a layer, or has it in another shape or quantized.
            UnsupportedError: it stores a layer's experts in a layout that is not read.
        """
        for layer in layers:
            found = self._layer(layer)
            if found is None and self._published(layer) is None:
                root, stored = str(self.description.checkpoint.root), tensors_of(self._reader.refs, layer)
                if stored:
                    raise UnsupportedError(
                        "quarkconv does not read the layout of the unquantized model's experts",
                        file=root,
                        tensor=layer.prefix,
                        expected=_described(layer, "float"),
                        found=stored,
                        hint="give --unquantized the model as transformers saves it, experts one by one or stacked",
                    )
                raise _other_model(layer, root, "no such layer")
            if found is not None:
                floats = all(form.is_float for form in found.all_forms)
                if found.geometry != layer.geometry or not floats:
                    shape = _described(found, "float" if floats else "not float")
                    raise _other_model(layer, str(self.description.checkpoint.root), shape)

    def _layer(self, layer: MoELayer) -> MoELayer | None:
        """The same layer here: of the same module, else the only one of the same number."""
        same = [found for found in self._layers if found.prefix == layer.prefix]
        found = same or [found for found in self._layers if found.index == layer.index]
        return found[0] if len(found) == 1 else None

    def _published(self, layer: MoELayer) -> PublishedLayer | None:
        known = knowledge(self.description.config.raw, layer.moe)
        interleaved = isinstance(known, Known) and known.family.interleaved
        return published_layer(self._reader.refs, layer, interleaved=interleaved)

    def weights(self, layer: MoELayer, device: torch.device) -> Weight:
        """Gives the weight of a projection of a layer, float64 [out, in] on a device."""
        found, published = self._layer(layer), self._published(layer)

        def weight(role: Role, expert: int) -> Tensor:
            if found is None:
                assert published is not None  # check() refuses a model without the layer
                return published.weight(self._reader, role, expert).to(device).double()
            stored = found.projection(role, expert)
            inner = found.intermediate if role == "down" else found.hidden
            if not found.transposed and not stored.alternate:
                return self._reader.floats(stored.names.weight, stored.weight).to(device).reshape(-1, inner).double()
            # Rows of gate and up alternate, or the matrices are [in, out]: the whole matrix, then the rows.
            matrix = self._reader.floats(stored.names.weight, Part(expert, found.experts) if found.transposed else None)
            rows = matrix.reshape(inner, -1).T if found.transposed else matrix.reshape(-1, inner)
            if role != "down":
                half = int(role == "up")
                rows = rows[half::2] if found.interleaved else rows.chunk(2)[half]
            return rows.to(device).double()

        return weight

    def router(self, layer: MoELayer) -> Router | Unknown:
        """The router of a layer, or why it is not known."""
        found = self._layer(layer)
        return router_of(layer if found is None else found, self.description.config.raw, self._reader)


@dataclass(frozen=True, slots=True)
class WeightCheck:
    """The weights of a layer beside the unquantized ones.

    Attributes:
        errors: role -> the errors of each expert.
        rescaled: the weights differ by factors per channel, as SmoothQuant and AWQ leave them; errors exclude them.
        outputs: the unquantized weights for the hidden states of the quantized layer.
        problems: the problems.
        inputs: the factors of the input channels, float64 [H]; None without rescaling.
    """

    errors: dict[str, tuple[WeightError, ...]]
    rescaled: bool
    outputs: Weight
    problems: tuple[Problem, ...]
    inputs: Tensor | None = None


def check_weights(experts: FusedExperts, weight: Weight) -> WeightCheck:
    """Compare every projection of a layer with the unquantized one.

    Where they differ by more than rounding, they are compared again without factors per channel
    (:mod:`quarkconv.verify.rescaling`); if that brings them within the bound, the factors are taken for those of
    SmoothQuant or AWQ.
    """
    errors = weight_errors(experts, weight)
    problems = tuple(weight_problems(experts, errors))
    as_stored = WeightCheck(errors, rescaled=False, outputs=weight, problems=problems)
    if not problems or "gate" not in experts.roles:
        return as_stored
    rescaling = estimate_rescaling(experts, weight)
    remaining = weight_errors(experts, rescaling.apply(weight))
    if any(weight_problems(experts, remaining)):
        return as_stored
    problems = ()
    if not rescaling.cancels:
        message = "Factors of up's rows and down's columns do not cancel: the layer's function changes"
        problems = (Problem("numbers", experts.layer, experts.module, message),)
    return WeightCheck(
        remaining, rescaled=True, outputs=rescaling.apply_inputs(weight), problems=problems, inputs=rescaling.inputs
    )


def weight_errors(experts: FusedExperts, weight: Weight) -> dict[str, tuple[WeightError, ...]]:
    """The errors of every projection of a layer against the unquantized one, by role and expert."""
    return {
        role: tuple(_weight_error(experts, role, expert, weight(role, expert)) for expert in range(experts.experts))
        for role in experts.roles
    }


def weight_problems(experts: FusedExperts, errors: Mapping[str, tuple[WeightError, ...]]) -> Iterator[Problem]:
    """One problem for each role that has weights out of bounds, about the worst of them."""
    for role, found in errors.items():
        wrong = [expert for expert, error in enumerate(found) if not error.relative_error <= WEIGHT_BOUND]
        if wrong:
            worst = max(wrong, key=lambda expert: found[expert].relative_error)
            message = (
                f"The weight is not the unquantized model's weight, rounded: relative error "
                f"{found[worst].relative_error:.3g}, bound {WEIGHT_BOUND:g}"
            )
            yield Problem("numbers", experts.layer, f"{experts.module}.{worst} ({role})", message, len(wrong))


def _weight_error(experts: FusedExperts, role: Role, expert: int, original: Tensor) -> WeightError:
    projection = experts.projection(role, expert)
    scale = projection.scale.double().unsqueeze(1)
    noise = (projection.codes.double() * scale - original).norm().item()
    signal = original.norm().item()
    relative = noise / signal if signal else (0.0 if noise == 0 else math.inf)
    clipped = (original.abs() > (CODE_MAX + 0.5) * scale).double().mean().item()
    return WeightError(relative, -20 * math.log10(relative) if 0 < relative < math.inf else None, clipped)


def _described(layer: MoELayer, stored: str) -> str:
    experts, hidden, intermediate = layer.geometry
    return f"{experts} experts of {hidden} x {intermediate}, {stored}"


def _other_model(layer: MoELayer, file: str, found: str) -> UsageError:
    return UsageError(
        "The unquantized model has no such layer in float with this shape",
        file=file,
        tensor=layer.prefix,
        expected=_described(layer, "float"),
        found=found,
        hint="give --unquantized the model before it was quantized",
    )
