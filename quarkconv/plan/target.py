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
        rows = form.weight[1][0]
        per_row = form.granularity == PER_CHANNEL
        yield OutputTensor(names.weight, *form.weight, (Piece.whole(names.weight, refs[names.weight]),))
        scale = scale_piece(names.scale, refs[names.scale], rows, per_row=per_row)
        yield OutputTensor(names.scale, "F32", (rows, 1), (scale,))
        if form.input_scale is not None:
            piece = scale_piece(names.input_scale, refs[names.input_scale], 1, per_row=False)
            yield OutputTensor(names.input_scale, "F32", form.input_scale[1], (piece,))

    def linear_bytes(self, form: Form) -> int:
        """Size of :meth:`linear_tensors`, without making them."""
        out, inner = form.weight[1]
        return out * inner + 4 * out + (4 if form.input_scale is not None else 0)

    def output_bytes(self, description: Description) -> int:
        """Size of all tensors of the output, without planning them."""
        consumed = sum(map(form_bytes, (form for _, form in description.stored if form.quantized)))
        experts = sum(self.expert_bytes(layer) for layer in description.int8_layers)
        linears = sum(
            self.linear_bytes(form)
            for module, form in description.stored.linears.items()
            if form.quantized and module not in description.topology.members
        )
        return description.checkpoint.tensor_bytes - consumed + experts + linears


def form_bytes(form: Form) -> int:
    """Size in bytes of the tensors of a module."""
    return sum(prod(kind[1]) * DTYPE_BITS[kind[0]] // 8 for kind in form if kind is not None)
