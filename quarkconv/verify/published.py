"""Layouts in which models are published, beside those that the topology knows: all experts of a layer in two tensors.

    transposed   P.gate_up_proj [E, H, 2I], P.down_proj [E, I, H]                            llama4, gpt_oss
    linear       M.input_linear.weight [E, 2I, H], M.output_linear.weight [E, H, I]          granitemoe

P is the module of the experts, M the one around it. A new layout is one row of :data:`_LAYOUTS`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final, NamedTuple

from torch import Tensor

from quarkconv.experts.layer import MoELayer, Part
from quarkconv.experts.naming import Role
from quarkconv.headers.safetensors import TensorRef
from quarkconv.load.layer_reader import LayerReader

FLOATS: Final = frozenset({"F32", "BF16", "F16", "F64"})
_SHOWN: Final = 4


class _Layout(NamedTuple):
    gate_up: str
    down: str
    transposed: bool


_LAYOUTS: Final = (
    _Layout("{experts}.gate_up_proj", "{experts}.down_proj", transposed=True),
    _Layout("{moe}.input_linear.weight", "{moe}.output_linear.weight", transposed=False),
)
_DECODER_LAYER: Final = re.compile(r"(?:^|\.)((?:layers|h|blocks)\.\d+\..*)$")


@dataclass(frozen=True, slots=True)
class PublishedLayer:
    """The experts of one layer in two float tensors.

    Attributes:
        gate_up, down: their names.
        transposed: both are stored [E, in, out].
        interleaved: outputs of gate and up alternate; else all of gate come first.
        geometry: E, H and I.
    """

    gate_up: str
    down: str
    transposed: bool
    interleaved: bool
    geometry: tuple[int, int, int]

    def weight(self, reader: LayerReader, role: Role, expert: int) -> Tensor:
        """The weight of a projection, [out, in]."""
        count, hidden, inner = self.geometry
        name, out, columns = (self.down, hidden, inner) if role == "down" else (self.gate_up, 2 * inner, hidden)
        values = reader.floats(name, Part(expert, count))
        matrix = values.view(columns, out).T if self.transposed else values.view(out, columns)
        if role == "down":
            return matrix
        if self.interleaved:
            return matrix[role == "up" :: 2]
        return matrix[:inner] if role == "gate" else matrix[inner:]


def published_layer(refs: Mapping[str, TensorRef], layer: MoELayer, *, interleaved: bool) -> PublishedLayer | None:
    """The experts of a layer in a published layout; None where no layout fits names, dtypes and shapes.

    Args:
        refs: the tensors of the unquantized checkpoint.
        layer: the layer of the quantized checkpoint.
        interleaved: outputs of gate and up alternate in models of this type.
    """
    count, hidden, inner = layer.geometry
    for moe in _modules(refs, layer.moe):
        for layout in _LAYOUTS:
            names = [name.format(moe=moe, experts=f"{moe}.experts") for name in (layout.gate_up, layout.down)]
            shapes = [(count, 2 * inner, hidden), (count, hidden, inner)]
            if layout.transposed:
                shapes = [(first, last, middle) for first, middle, last in shapes]
            found = [refs.get(name) for name in names]
            if all(
                ref is not None and ref.dtype in FLOATS and ref.shape == shape
                for ref, shape in zip(found, shapes, strict=True)
            ):
                return PublishedLayer(names[0], names[1], layout.transposed, interleaved, layer.geometry)
    return None


def tensors_of(refs: Mapping[str, TensorRef], layer: MoELayer) -> str:
    """The tensors below the layer's MoE module with two dimensions or more, for people; empty without any."""
    shown: list[str] = []
    for moe in _modules(refs, layer.moe):
        for name, ref in refs.items():
            if name.startswith(f"{moe}.") and len(ref.shape) > 1:
                shown.append(f"{name} {ref.dtype} {list(ref.shape)}")
    more = f" and {len(shown) - _SHOWN} more" if len(shown) > _SHOWN else ""
    return ", ".join(shown[:_SHOWN]) + more


def _modules(refs: Mapping[str, TensorRef], moe: str) -> Iterator[str]:
    """The module itself, and those with the same name below ``layers.N`` under another wrapper."""
    yield moe
    match = _DECODER_LAYER.search(moe)
    if match is None:
        return
    tail = re.compile(rf"(?:^|.*\.){re.escape(match[1])}(?=\.)")
    wrapped = {found[0] for name in refs if (found := tail.match(name)) is not None}
    if len(wrapped - {moe}) == 1:
        yield from wrapped - {moe}
