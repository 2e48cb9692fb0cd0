"""The data of charts, shared by page and terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from quarkconv.verify.layer_results import SCALE_EDGES, Distance, LayerExperts, LayerNumbers

if TYPE_CHECKING:
    from quarkconv.evaluate.results import Evaluation


class Extreme(NamedTuple):
    """A value, and the layer and the expert that it belongs to."""

    value: float
    layer: int
    expert: int


@dataclass(frozen=True, slots=True)
class Noise:
    """Signal to noise of the layers' outputs, for one number of tokens.

    Attributes:
        tokens: how many per layer.
        layers: numbers of the layers.
        lines: reference -> decibels for each layer; None where they are equal, or NaN.
    """

    tokens: int
    layers: tuple[int, ...]
    lines: dict[str, tuple[float | None, ...]]

    def lowest(self, name: str) -> tuple[float, int]:
        """The lowest value of a line with values, and its layer."""
        return min((value, at) for value, at in zip(self.lines[name], self.layers, strict=True) if value is not None)


@dataclass(frozen=True, slots=True)
class ExpertMap:
    """A value for each expert of each layer.

    Attributes:
        title: of the chart.
        unit: of the values, for people.
        layers: numbers of the layers, one for each row.
        cells: a row for each layer, a value for each of its experts; None where it is not finite.
        form: how a value is written.
        floor: value of the lowest colour or mark; None for the smallest value.
        note: a remark; may be empty.
    """

    title: str
    unit: str
    layers: tuple[int, ...]
    cells: tuple[tuple[float | None, ...], ...]
    form: str = ".3g"
    floor: float | None = None
    note: str = ""

    @property
    def extremes(self) -> tuple[Extreme, Extreme] | None:
        """The smallest and the largest value; None without any."""
        found = [
            Extreme(value, layer, expert)
            for layer, row in zip(self.layers, self.cells, strict=True)
            for expert, value in enumerate(row)
            if value is not None
        ]
        return (min(found), max(found, key=lambda item: item.value)) if found else None

    @property
    def unknown(self) -> int:
        """How many experts have no finite value."""
        return sum(row.count(None) for row in self.cells)

    def described(self) -> str:
        """The map in words."""
        if self.extremes is None:
            return f"{self.title}: no expert has a finite value."
        low, high = self.extremes
        summary = (
            f"{self.title} by layer, {self.unit}: from {low.value:{self.form}} to {high.value:{self.form}}, "
            f"the largest in layer {high.layer}, expert {high.expert}"
        )
        unknown = f"{self.unknown} experts without a finite value" if self.unknown else ""
        return "; ".join(filter(None, (summary, self.note, unknown))) + "."


@dataclass(frozen=True, slots=True)
class Histogram:
    """Counts of weight scales by bin, from the first bin with any to the last.

    Attributes:
        edges: of the bins, as exponents of ten; one more than bins.
        counts: of the bins.
    """

    edges: tuple[float, ...]
    counts: tuple[int, ...]


def signal_to_noise(layers: Sequence[LayerNumbers]) -> list[Noise]:
    """Signal to noise by layer, for each number of tokens; omits comparisons that were not made."""
    series = []
    for tokens in dict.fromkeys(layer.tokens for layer in layers):
        chosen = [layer for layer in layers if layer.tokens == tokens]
        lines = {
            "dequantized": tuple(_snr(layer.dequantized) for layer in chosen),
            "with outliers": tuple(_snr(layer.outliers) for layer in chosen),
            "unquantized": tuple(_snr(layer.unquantized) for layer in chosen),
        }
        known = {name: line for name, line in lines.items() if any(value is not None for value in line)}
        series.append(Noise(tokens, tuple(layer.layer for layer in chosen), known))
    return series


def weight_errors(layers: Sequence[LayerExperts]) -> ExpertMap | None:
    """The error of each expert's weights; None without an unquantized model."""
    if not any(layer.weights for layer in layers):
        return None
    return ExpertMap(
        "Weight error of each expert",
        "relative error",
        _numbers(layers),
        tuple(map(_worst_errors, layers)),
        note="the worst of its projections",
    )


def scale_ranges(layers: Sequence[LayerExperts]) -> ExpertMap:
    """Ratio of the largest to the smallest weight scale of each expert, in decades."""
    cells = tuple(
        tuple(
            math.log10(high / low) if low > 0 and math.isfinite(high) else None
            for low, high in zip(layer.scale_min, layer.scale_max, strict=True)
        )
        for layer in layers
    )
    return ExpertMap("Range of each expert's scales", "decades", _numbers(layers), cells)


def expert_load(layers: Sequence[LayerExperts]) -> ExpertMap | None:
    """Tokens routed to each expert; None without routing."""
    return load_map(_numbers(layers), [layer.load for layer in layers])


def load_map(layers: Sequence[int], loads: Sequence[Sequence[int]]) -> ExpertMap | None:
    """Tokens of each expert of each layer; None where there are none.

    Args:
        layers: numbers of the layers.
        loads: tokens of each expert, for each layer.
    """
    if not any(map(any, loads)):
        return None
    busiest = max(max(load) * len(load) / sum(load) for load in loads if any(load))
    return ExpertMap(
        "Load of each expert",
        "tokens",
        tuple(layers),
        tuple(tuple(map(float, load)) for load in loads),
        form=",.0f",
        floor=0.0,
        note=f"busiest: {busiest:.1f} times its layer's mean",
    )


def evaluation_load(evaluation: Evaluation) -> ExpertMap | None:
    """Tokens of each expert on the text that a model was evaluated on; None without experts."""
    layers = [layer for layer in evaluation.layers if layer.load]
    return load_map([layer.index for layer in layers], [layer.load for layer in layers])


def scale_distribution(layers: Sequence[LayerExperts]) -> Histogram:
    """The weight scales of all layers."""
    totals = [sum(layer.scale_histogram[at] for layer in layers) for at in range(len(SCALE_EDGES) - 1)]
    filled = [at for at, total in enumerate(totals) if total] or [0]
    first, last = filled[0], filled[-1]
    return Histogram(SCALE_EDGES[first : last + 2], tuple(totals[first : last + 1]))


def _numbers(layers: Sequence[LayerExperts]) -> tuple[int, ...]:
    return tuple(layer.layer for layer in layers)


def _worst_errors(layer: LayerExperts) -> tuple[float | None, ...]:
    """The largest error among an expert's projections; None if one is not finite."""
    columns = [[error.relative_error for error in errors] for errors in layer.weights.values()]
    worst = (max(values) if all(map(math.isfinite, values)) else None for values in zip(*columns, strict=True))
    return tuple(worst)


def _snr(distance: Distance | None) -> float | None:
    if distance is None or distance.snr_db is None or not math.isfinite(distance.snr_db):
        return None
    return distance.snr_db
