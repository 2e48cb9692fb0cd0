"""Scales and zero points of int8 linears outside of the layers of experts, whose outputs are not computed.

A scale must be finite and not zero, save where all codes of its row are zero; one of activations also positive. Engines
read no zero points and so take them for zero.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quarkconv.description.description import Description
from quarkconv.load.layer_reader import READERS, LayerReader
from quarkconv.scheme.form import Form, TensorNames, linear_names
from quarkconv.verify.places import layer_of
from quarkconv.verify.results import Problem
from quarkconv.verify.zero_points import NONZERO

_AT_ONCE: Final = 256
"""Modules whose scales are in memory at once."""


class _Linear(NamedTuple):
    names: TensorNames
    form: Form

    def companions(self) -> Iterator[str]:
        """The names of its scales and zero points."""
        yield from (name for name, kind in zip(self.names[1:], self.form.tensors[1:], strict=True) if kind is not None)


def linear_problems(description: Description, experts: Collection[str]) -> Iterator[Problem]:
    """A problem for each int8 linear with a scale or zero point of a wrong value.

    Args:
        description: the checkpoint.
        experts: the modules that are checked as experts of a layer, or not at all.

    Raises:
        SourceError: a file cannot be read.
        UnsupportedError: a tensor has a dtype that torch does not have.
    """
    linears = [
        _Linear(linear_names(module), form)
        for module, form in description.stored.linears.items()
        if form.quantized and form.scale is not None and module not in experts
    ]
    with ThreadPoolExecutor(READERS) as pool, LayerReader(description, pool) as reader:
        for first in range(0, len(linears), _AT_ONCE):
            group = linears[first : first + _AT_ONCE]
            values = reader.tensors(name for linear in group for name in linear.companions())
            for linear in group:
                for name, message in _wrong(linear, values, reader):
                    yield Problem("numbers", layer_of(description, name), name, message)


def _wrong(linear: _Linear, values: dict[str, Tensor], reader: LayerReader) -> Iterator[tuple[str, str]]:
    """The tensors of a linear that are wrong, and why."""
    names, form = linear.names, linear.form
    scale = values[names.scale].float()
    if not bool(torch.isfinite(scale).all()):
        yield names.scale, "The scale has values that are not finite"
    elif form.granularity is not None and bool((scale == 0).any()):
        used = reader.tensors([names.weight])[names.weight].reshape(scale.numel(), -1).any(dim=1)
        if bool((used & (scale == 0).flatten()).any()):
            yield names.scale, "The scale is zero for rows with nonzero codes"
    if form.input_scale is not None:
        static = values[names.input_scale].float()
        if not bool((torch.isfinite(static) & (static > 0)).all()):
            yield names.input_scale, "The scale of the activations is not finite and positive"
    for name in names.zero_points(form):
        if bool(values[name].any()):
            yield name, NONZERO
