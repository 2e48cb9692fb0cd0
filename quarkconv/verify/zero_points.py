"""Zero points of experts: engines and references take them for zero, so that others make every result wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from quarkconv.experts.layer import MoELayer
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify.results import Problem

NONZERO: Final = "The zero point is not zero: engines ignore it and compute wrong weights"


def zero_point_problems(layer: MoELayer, reader: LayerReader) -> Iterator[Problem]:
    """A problem for a layer whose experts have zero points that are not zero.

    Raises:
        SourceError: a file cannot be read.
        UnsupportedError: a zero point has a dtype that torch does not have.
    """
    if not any(any(form.zero_points) for form in layer.all_forms):
        return
    projections = (layer.projection(role, expert) for role in layer.roles for expert in range(layer.experts))
    names = {name for found in projections for name in found.names.zero_points(found.form)}
    wrong = [name for name, values in reader.tensors(sorted(names)).items() if bool(values.any())]
    if wrong:
        yield Problem("numbers", layer.index, wrong[0], NONZERO, len(wrong))
