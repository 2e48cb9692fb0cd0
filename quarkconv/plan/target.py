"""What a target is: how it names, shapes and describes the tensors of a converted model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any, ClassVar

from quarkconv.description import Description
from quarkconv.experts.topology import MoELayer
from quarkconv.headers.safetensors import DTYPE_BITS, TensorRef
from quarkconv.plan.pieces import OutputTensor, Piece
from quarkconv.plan.sources import ExpertSource, scale_piece
from quarkconv.scheme.spec import PER_CHANNEL
from quarkconv.scheme.stored import Form, linear_names


class Target(ABC):
    """A format to convert to. A subclass is one file in :mod:`quarkconv.targets`.

    Attributes:
        name: as given to ``--to``.
        summary: one line for people.
    """

    name: ClassVar[str]
    summary: ClassVar[str]

    @abstractmethod
    def unsupported(self, description: Description) -> str | None:
        """Why this target cannot represent a checkpoint that is sound; None when it can."""

    @abstractmethod
    def expert_tensors(self, source: ExpertSource) -> Iterator[OutputTensor]:
        """The output tensors of the routed experts of one layer."""

    @abstractmethod
    def expert_bytes(self, layer: MoELayer) -> int:
        """Size of :meth:`expert_tensors`, without making them."""

    @abstractmethod
    def config(self, description: Description) -> dict[str, Any]:
        """The config.json of the output."""

    def linear_tensors(self, module: str, form: Form, refs: Mapping[str, TensorRef]) -> Iterator[OutputTensor]:
        """The output tensors of another int8 linear: codes as they are, weight_scale F32 [out, 1], no zero point.

        A scale per tensor is repeated over the rows, a 16-bit scale is widened; both are exact.
        """
        names = linear_names(module)
        *lead, rows, _ = form.weight[1]
        per_row = form.granularity == PER_CHANNEL
        yield OutputTensor(names.weight, *form.weight, (Piece.whole(names.weight, refs[names.weight]),))
        parts = prod(lead)
        scales = (
            scale_piece(names.scale, refs[names.scale], rows, part=part, parts=parts, per_row=per_row)
            for part in range(parts)
        )
        yield OutputTensor(names.scale, "F32", (*lead, rows, 1), tuple(scales))
        if form.input_scale is not None:
            piece = scale_piece(names.input_scale, refs[names.input_scale], 1, per_row=False)
            yield OutputTensor(names.input_scale, "F32", form.input_scale[1], (piece,))

    def linear_bytes(self, form: Form) -> int:
        """Size of :meth:`linear_tensors`, without making them."""
        static = 0 if form.input_scale is None else 4 * prod(form.input_scale[1])
        return prod(form.weight[1]) + 4 * prod(form.weight[1][:-1]) + static

    def output_bytes(self, description: Description) -> int:
        """Size of all tensors of the output, without planning them."""
        consumed = sum(len(modules) * form_bytes(form) for form, _, modules in description.modules.quantized())
        experts = sum(self.expert_bytes(layer) for layer in description.int8_layers)
        members = description.topology.members
        linears = sum(
            self.linear_bytes(form) * sum(module not in members for module in modules)
            for form, _, modules in description.modules.quantized()
        )
        return description.checkpoint.tensor_bytes - consumed + experts + linears


def form_bytes(form: Form) -> int:
    """Size in bytes of the tensors of a module."""
    return sum(prod(kind[1]) * DTYPE_BITS[kind[0]] // 8 for kind in form if kind is not None)
