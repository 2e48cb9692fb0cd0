"""What is summed over the tokens of a layer: errors of hidden states and of experts, routing."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quarkconv.evaluate.layer_ops import compare_rows, is_finite, on_kernels

_COUNTS: Final = ("tokens", "changed")
_NUMBERS: Final = ("difference", "norm", "baseline_norm", "own_difference", "own_norm", "expert_norm")
TENSORS: Final = ("load", "expert_errors", "expert_tokens")
"""Fields of :class:`LayerSums` that are tensors."""


@dataclass(slots=True)
class LayerSums:
    """Sums over tokens of one layer; those of several batches and devices are added.

    Attributes:
        difference: squared difference of the INT8 model's and the baseline's hidden states after the layer.
        norm, baseline_norm: squared norms of both.
        own_difference, own_norm: as ``difference`` and ``baseline_norm``, both given the baseline's hidden states.
        tokens: number of tokens.
        changed: tokens that choose other experts than in the baseline.
        routed: the layer has routed experts.
        load: tokens that each expert receives, int64 [E]; None without experts.
        expert_errors: squared error of each expert's weighted outputs, float64 [E], on a sample of tokens.
        expert_tokens: tokens of the sample that each expert receives, int64 [E].
        expert_norm: squared norm of the sum of the sample's expert outputs.
    """

    difference: float = 0.0
    norm: float = 0.0
    baseline_norm: float = 0.0
    own_difference: float = 0.0
    own_norm: float = 0.0
    tokens: int = 0
    changed: int = 0
    routed: bool = False
    load: Tensor | None = None
    expert_errors: Tensor | None = None
    expert_tokens: Tensor | None = None
    expert_norm: float = 0.0

    def add(self, other: LayerSums) -> None:
        """Add the sums of other tokens."""
        for name in (*_NUMBERS, *_COUNTS):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.routed = self.routed or other.routed
        for name in TENSORS:
            value, added = getattr(self, name), getattr(other, name)
            setattr(self, name, added if value is None else value if added is None else value + added)

    @property
    def drift(self) -> float:
        """Relative error of the INT8 model's hidden states."""
        return relative(self.difference, self.baseline_norm)

    @property
    def own(self) -> float:
        """Relative error of the layer on the baseline's hidden states."""
        return relative(self.own_difference, self.own_norm)

    @property
    def cosine(self) -> float:
        """Cosine similarity of the INT8 model's and the baseline's hidden states."""
        both = math.sqrt(self.norm * self.baseline_norm)
        product = (self.norm + self.baseline_norm - self.difference) / 2
        return product / both if both else 1.0


class DeviceSums:
    """The sums of one batch, on its device until they are copied all at once: a copy waits for the device.

    Attributes:
        tokens: number of tokens that were compared.
    """

    def __init__(self) -> None:
        self.tokens = 0
        self._values: dict[str, Tensor] = {}

    def add(self, **values: Tensor) -> None:
        """Keep numbers, or one number for each expert, under the names of :class:`LayerSums`."""
        self._values |= {name: value.double().reshape(-1) for name, value in values.items()}

    def check(self, variant: str, states: Tensor) -> None:
        """Keep whether hidden states are finite."""
        finite = is_finite(states) if on_kernels(states) else states.isfinite().all()
        self._values[f"{_FINITE}{variant}"] = finite.double().reshape(-1)

    def take(self) -> tuple[LayerSums, list[str]]:
        """The sums, and the variants whose hidden states are not finite."""
        sums = LayerSums(tokens=self.tokens)
        if not self._values:
            return sums, []
        sizes = [len(value) for value in self._values.values()]
        found = torch.split(torch.cat(list(self._values.values())).cpu(), sizes)
        infinite = []
        for name, value in zip(self._values, found, strict=True):
            if name.startswith(_FINITE):
                if not value.item():
                    infinite.append(name.removeprefix(_FINITE))
            elif name in TENSORS:
                setattr(sums, name, value if name == "expert_errors" else value.long())
            else:
                setattr(sums, name, int(value) if name in _COUNTS else value.item())
        sums.routed = "changed" in self._values
        return sums, infinite


_FINITE: Final = "finite in "


def relative(difference: float, norm: float) -> float:
    """Relative error from two sums of squares."""
    return math.sqrt(difference / norm) if norm else (0.0 if difference == 0 else math.inf)


def squares(tensor: Tensor) -> Tensor:
    """The sum of squares, float64, a scalar of the tensor's device: norms of rows in float32, their squares in float64.

    A row is read once; in float64 the tensor would be written and read several times.
    """
    wide = torch.promote_types(tensor.dtype, torch.float32)
    norms: Tensor = torch.linalg.vector_norm(tensor, dim=-1, dtype=wide)
    return norms.double().square().sum()


def compared(one: Tensor, other: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of squares of ``one - other``, of ``one`` and of ``other``, as :func:`squares`."""
    if on_kernels(one):
        difference, first, second = compare_rows(one, other).unbind()
        return difference, first, second
    wide = torch.promote_types(one.dtype, torch.float32)
    return squares(one.to(wide) - other.to(wide)), squares(one), squares(other)
