"""Zero points of experts: engines and references take them for zero, so that others make every result wrong."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from quarkconv.experts.topology import MoELayer
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify.results import Problem

NONZERO: Final = "The zero point is not zero: engines compute other weights than it means"
_FIELDS: Final = ("zero_point", "input_zero_point", "offset")
"""Fields of a form, and of its names, that hold zero points."""


def zero_point_problems(layer: MoELayer, reader: LayerReader) -> Iterator[Problem]:
    """A problem for a layer whose experts have zero points that are not zero.

    Raises:
        SourceError: a file cannot be read.
        UnsupportedError: a zero point has a dtype that torch does not have.
    """
    if not any(getattr(form, field) for form in layer.all_forms for field in _FIELDS):
        return
    projections = [layer.projection(role, expert) for role in layer.roles for expert in range(layer.experts)]
    names = {getattr(found.names, field) for found in projections for field in _FIELDS if getattr(found.form, field)}
    wrong = [name for name, values in reader.tensors(sorted(names)).items() if bool(values.any())]
    if wrong:
        yield Problem("numbers", layer.index, wrong[0], NONZERO, len(wrong))
