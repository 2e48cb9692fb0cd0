"""The results of one layer: its numbers, its experts, and how far its weights are from the unquantized ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

RESCALED: Final = (
    "Weights differ from the unquantized model's by factors per channel, as SmoothQuant and AWQ leave them; the errors "
    "are without these factors"
)
SCALE_EDGES: Final = tuple(round(-8 + 0.25 * step, 2) for step in range(41))
"""Edges of the bins of a histogram of scales, as powers of ten."""


@dataclass(frozen=True, slots=True)
class Distance:
    """How far two outputs [M, H] are from one another.

    Attributes:
        relative_error: Frobenius norm of the difference over that of the reference.
        cosine: cosine of the angle between the two.
        snr_db: signal to noise in decibels; None when they are equal.
        max_error: largest difference, over the root mean square of the reference.
        bound: largest accepted ``relative_error``.
    """

    relative_error: float
    cosine: float
    snr_db: float | None
    max_error: float
    bound: float

    @property
    def ok(self) -> bool:
        """Within the bound; never for NaN."""
        return self.relative_error <= self.bound


@dataclass(frozen=True, slots=True)
class LayerNumbers:
    """The numbers of one layer.

    Attributes:
        layer: number of the layer.
        module: module of its experts.
        tokens: number of tokens requested.
        inputs: the source of their hidden states, for people.
        experts, reached: E, and how many of them got tokens.
        routing: how tokens were routed, for people.
        activation: the activation function.
        exact: distance of the INT8 forward from the exact reference.
        dequantized: distance of the INT8 forward from the dequantized reference, for Gaussian or recorded inputs.
        outliers: the same for inputs with outlier channels; None where none were drawn.
        unquantized: distance of the INT8 forward from the unquantized model, for the inputs of ``dequantized``, without
            a bound; None without ``--unquantized``.
        seconds: wall time of the layer.
    """

    layer: int
    module: str
    tokens: int
    inputs: str
    experts: int
    reached: int
    routing: str
    activation: str
    exact: Distance
    dequantized: Distance
    outliers: Distance | None
    unquantized: Distance | None
    seconds: float

    @property
    def is_zero(self) -> bool:
        """Whether both outputs are zero, so that their distance is meaningless."""
        return self.exact.relative_error == 0 and math.isnan(self.exact.cosine)

    @property
    def ok(self) -> bool:
        """All distances within their bounds, of outputs that are not zero."""
        if self.is_zero:
            return False
        distances = (self.exact, self.dequantized, self.outliers, self.unquantized)
        return all(item.ok for item in distances if item is not None)


@dataclass(frozen=True, slots=True)
class WeightError:
    """How far the dequantized weights of one projection of an expert are from the unquantized ones.

    Attributes:
        relative_error: Frobenius norm of the difference over that of the unquantized weight.
        snr_db: the same in decibels; None when they are equal.
        clipped: share of the weights outside the range of the codes.
    """

    relative_error: float
    snr_db: float | None
    clipped: float


class LinearError(NamedTuple):
    """An int8 linear outside of the routed experts.

    Attributes:
        module: its name.
        relative_error: as that of :class:`WeightError`, without factors per input channel where there are some.
    """

    module: str
    relative_error: float


class ExpertWeight(NamedTuple):
    """The weight of one projection of an expert, by its place, and its error.

    Attributes:
        layer: number of the layer.
        module: module of the layer's experts.
        role: ``gate``, ``up`` or ``down``.
        expert: number of the expert.
        error: how far it is from the unquantized weight.
    """

    layer: int
    module: str
    role: str
    expert: int
    error: WeightError


@dataclass(frozen=True, slots=True)
class LayerExperts:
    """Statistics of each expert of a layer.

    Attributes:
        layer: number of the layer.
        module: module of its experts.
        load: tokens that the routing sent to each expert, of those that were drawn.
        scale_min, scale_max: smallest and largest magnitude of the weight scales of each expert.
        scale_histogram: how many weight scales of the layer lie in each bin of :data:`SCALE_EDGES`.
        weights: role -> the weight errors of each expert; empty without ``--unquantized``.
        rescaled: the weights differ by factors per channel, as SmoothQuant and AWQ leave them; errors exclude them.
    """

    layer: int
    module: str
    load: tuple[int, ...]
    scale_min: tuple[float, ...]
    scale_max: tuple[float, ...]
    scale_histogram: tuple[int, ...]
    weights: dict[str, tuple[WeightError, ...]]
    rescaled: bool = False

    def to_json(self) -> dict[str, Any]:
        """Columns rather than rows: a large model has 50,000 projections."""
        weights = {
            role: {
                "relative_error": [_rounded(item.relative_error) for item in errors],
                "clipped": [_rounded(item.clipped) for item in errors],
            }
            for role, errors in self.weights.items()
        }
        return {
            "layer": self.layer,
            "module": self.module,
            "load": list(self.load),
            "scale_min": list(map(_rounded, self.scale_min)),
            "scale_max": list(map(_rounded, self.scale_max)),
            "scale_histogram": list(self.scale_histogram),
            "weights": weights,
            "rescaled": self.rescaled,
        }


def _rounded(value: float) -> float | None:
    """Four digits: enough for a picture, and short."""
    return float(f"{value:.4g}") if math.isfinite(value) else None
