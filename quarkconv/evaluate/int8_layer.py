"""The modules of one decoder layer that compute in INT8, and putting them in the places of transformers' own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from quarkconv.errors import UnsupportedError
from quarkconv.evaluate.dequantize import dequantized
from quarkconv.evaluate.expert_classes import identities
from quarkconv.evaluate.int8 import Int8Experts, Int8GroupedLinear, Int8Linear, linear_groups
from quarkconv.evaluate.int8_product import QuantizedRows
from quarkconv.evaluate.request import VERIFY_INSTEAD
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.evaluate.weights import Int8Weight, LayerWeights
from quarkconv.experts.function import Unknown
from quarkconv.experts.knowledge import expert_activation


def int8_modules(
    skeleton: Skeleton, number: int, weights: LayerWeights, config: Mapping[str, Any]
) -> Iterator[tuple[str, nn.Module]]:
    """Path -> the module that computes in INT8 in its place.

    Args:
        skeleton: the model, with the layer filled.
        number: the decoder layer.
        weights: of that layer, on the skeleton's device.
        config: config.json of the checkpoint.

    Raises:
        UnsupportedError: a linear or the experts have no counterpart that computes in INT8.
    """
    rows = QuantizedRows()
    for path, names in weights.linears.items():
        module = skeleton.module(path)
        groups = linear_groups(module)
        if not groups or not isinstance(module, nn.Linear):
            continue
        linear = _joined([weights.matrices[name] for name in names], module.weight)
        if linear is None:
            raise UnsupportedError(
                "The rows of a linear differ between the model's class and the checkpoint's int8 linears",
                file=str(skeleton.root),
                tensor=f"{path}.weight",
                hint=VERIFY_INSTEAD,
            )
        bias = [None] * groups if module.bias is None else module.bias.chunk(groups)
        parts = [
            Int8Linear(codes, scale, shift, linear.input_scale, module.weight.dtype, rows)
            for codes, scale, shift in zip(linear.codes.chunk(groups), linear.scale.chunk(groups), bias, strict=True)
        ]
        yield path, parts[0] if type(module).forward is nn.Linear.forward else Int8GroupedLinear(parts)
    for path, (layer, experts) in weights.experts.items():
        activation = expert_activation(config, layer)
        if isinstance(activation, Unknown):
            raise UnsupportedError(
                "These experts cannot run in INT8: their function is unknown",
                file=str(skeleton.root),
                tensor=layer.prefix,
                found=activation.reason,
                hint="leave this layer out of --layers to run it dequantized",
            )
        classes = skeleton.experts_of(number)
        if path not in classes:
            raise UnsupportedError(
                "The class of these experts cannot be replaced",
                file=str(skeleton.root),
                tensor=layer.prefix,
                expected="routed experts in one module",
                found=type(skeleton.layers[number]).__name__,
                hint=VERIFY_INSTEAD,
            )
        group = skeleton.group if path in weights.divided else None
        yield path, Int8Experts(experts, activation, group, identities(classes[path]))


@contextmanager
def in_place(skeleton: Skeleton, modules: Mapping[str, nn.Module]) -> Iterator[None]:
    """The model with other modules in the places of its own."""
    model, before = skeleton.model, {}
    for path, module in modules.items():
        before[path] = model.get_submodule(path)
        model.set_submodule(path, module)
    try:
        yield
    finally:
        for path, module in before.items():
            model.set_submodule(path, module)


def _joined(parts: Sequence[Int8Weight], weight: Tensor) -> Int8Weight | None:
    """The int8 linears that make up one linear of the model, one after the other or row by row in turn.

    Args:
        parts: in the order of the checkpoint's names.
        weight: of the model's linear, [out, in], as it was filled.

    Returns:
        The linear whose dequantized weight is ``weight``; None where neither order gives it.
    """
    orders: list[tuple[Sequence[Int8Weight], bool]] = [(parts, False), (parts[::-1], False)]
    if len({part.codes.shape for part in parts}) == 1:
        orders += [(parts, True), (parts[::-1], True)]
    for order, in_turn in orders:
        join = (lambda tensors: torch.stack(tensors, 1).flatten(0, 1)) if in_turn else torch.cat
        codes, scale = join([part.codes for part in order]), join([part.scale for part in order])
        static = {None if part.input_scale is None else part.input_scale.item() for part in order}
        if codes.shape == weight.shape and len(static) == 1:
            expected = dequantized(codes, scale).to(weight.dtype)
            if torch.equal(expected, weight):
                return Int8Weight(codes, scale, order[0].input_scale)
    return None
