"""The calls of decoder layers for each batch. Batches of one length share them: masks and positions are equal."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from quarkconv.evaluate.forward import LayerCall

Calls = tuple[list[LayerCall], list[LayerCall]]
"""The call of each layer of the evaluated model, and of the baseline's."""


def shared_calls(calls: Calls, before: Sequence[Calls]) -> Calls:
    """The calls of a batch; those of an earlier batch on the same device where they are equal."""
    for other in before:
        compared: dict[tuple[int, int], bool] = {}
        if all(
            _equal(one.kwargs, two.kwargs, compared) and _equal(one.args, two.args, compared)
            for calls_of_one, calls_of_two in zip(calls, other, strict=True)
            for one, two in zip(calls_of_one, calls_of_two, strict=True)
        ):
            return other
    return calls


def _equal(one: object, two: object, compared: dict[tuple[int, int], bool]) -> bool:
    """Whether two arguments are equal. Layers share a few tensors: each pair is compared once."""
    if isinstance(one, Tensor) and isinstance(two, Tensor):
        key = id(one), id(two)
        if key not in compared:
            fits = one.shape == two.shape and one.device == two.device
            compared[key] = one is two or (fits and torch.equal(one, two))
        return compared[key]
    if isinstance(one, dict) and isinstance(two, dict):
        return one.keys() == two.keys() and all(_equal(one[key], two[key], compared) for key in one)
    if isinstance(one, tuple | list) and isinstance(two, tuple | list):
        return len(one) == len(two) and all(_equal(*pair, compared) for pair in zip(one, two, strict=True))
    return one is two or one == two
