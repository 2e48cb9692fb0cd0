"""The model before it was quantized: its weights beside the codes and scales, expert by expert."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final

import torch
from torch import Tensor

from quarkconv.description.description import Description
from quarkconv.errors import UsageError
from quarkconv.experts.layer import Part
from quarkconv.experts.naming import Role
from quarkconv.experts.topology import MoELayer
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify.reference import CODE_MAX
from quarkconv.verify.results import Problem, WeightError

WEIGHT_BOUND: Final = 0.25
"""Bound on the relative error of a weight. Rounding to 8 bits with a scale per row gives a row whose largest value is c
times its root mean square an error of c / 440. Weights have c from 4 to about 20; the bound would take 110. What lies
beyond is no rounding: other weights, other scales, or rows in another order."""


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
        self._files = LayerReader(description, pool)
        self._layers = description.moe_layers

    def __enter__(self) -> UnquantizedModel:
        return self

    def __exit__(self, *error: object) -> None:
        self._files.__exit__(*error)

    def check(self, layers: Sequence[MoELayer]) -> None:
        """Refuse a model that does not have these layers in these shapes, stored in float.

        Raises:
            UsageError: so it is.
        """
        for layer in layers:
            found = self._layer(layer)
            floats = found is not None and all(form.is_float for form in found.all_forms)
            if found is None or found.geometry != layer.geometry or not floats:
                raise UsageError(
                    "The unquantized model does not have this layer in float and in this shape",
                    file=str(self.description.checkpoint.root), tensor=layer.prefix,
                    expected=_said(layer, "float"),
                    found="no such layer" if found is None else _said(found, "float" if floats else "not float"),
                    hint="give --unquantized the model that was quantized, in BF16",
                )  # fmt: skip

    def _layer(self, layer: MoELayer) -> MoELayer | None:
        """The same layer here: of the same module, else the only one of the same number."""
        same = [found for found in self._layers if found.prefix == layer.prefix]
        numbered = [found for found in self._layers if found.index == layer.index]
        found = same or numbered
        return found[0] if len(found) == 1 else None

    def weights(self, layer: MoELayer, device: torch.device) -> Weight:
        """Gives the weight of a projection of a layer, float64 [out, in] on a device."""
        mine = self._layer(layer)
        assert mine is not None  # check() refuses a model without the layer

        def weight(role: Role, expert: int) -> Tensor:
            stored = mine.projection(role, expert)
            inner = mine.intermediate if role == "down" else mine.hidden
            if not mine.transposed and not stored.alternate:
                return self._files.floats(stored.names.weight, stored.weight).to(device).reshape(-1, inner).double()
            # Rows of gate and up alternate, or the matrices are [in, out]: the whole matrix, then the rows.
            matrix = self._files.floats(stored.names.weight, Part(expert, mine.experts) if mine.transposed else None)
            rows = matrix.reshape(inner, -1).T if mine.transposed else matrix.reshape(-1, inner)
            if role != "down":
                half = int(role == "up")
                rows = rows[half::2] if mine.interleaved else rows.chunk(2)[half]
            return rows.to(device).double()

        return weight


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
                f"The weight is not the unquantized model's, rounded: relative error "
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


def _said(layer: MoELayer, stored: str) -> str:
    experts, hidden, intermediate = layer.geometry
    return f"{experts} experts of {hidden} x {intermediate}, {stored}"
