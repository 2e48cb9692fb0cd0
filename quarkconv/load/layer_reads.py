"""Which bytes of which files make the codes of a layer, and where they go in its memory.

Whatever the layout on disk, the codes lie in memory as the INT8 forward takes them: w13 [E, 2I, H], and from the next
page on w2 [E, H, I]. Putting experts together costs nothing: each range is read to where it belongs.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from quarkconv.experts.naming import ROLES
from quarkconv.experts.topology import MoELayer
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.manifest import Manifest, WrittenTensor

PAGE: Final = 4096
CHUNK_BYTES: Final = 16 * 2**20
"""Bytes of one read at most, so that several threads read a large tensor."""


class LayerRead(NamedTuple):
    """A byte range of a file, and its place in the memory of a layer.

    Attributes:
        tensor: the tensor that it belongs to.
        file: its file.
        start: first byte in the file.
        nbytes: length.
        at: first byte in memory.
        checksum: what the manifest says of this range; empty where it says nothing.
        source: the tensor of the source that it came from, for messages.
    """

    tensor: str
    file: str
    start: int
    nbytes: int
    at: int
    checksum: str = ""
    source: str = ""


def layer_nbytes(layer: MoELayer) -> int:
    """Size of the codes of a layer in memory."""
    return w2_offset(layer) + layer.experts * layer.hidden * layer.intermediate


def w2_offset(layer: MoELayer) -> int:
    """Where w2 starts."""
    return -(-2 * layer.experts * layer.intermediate * layer.hidden // PAGE) * PAGE


def layer_reads(
    layer: MoELayer, refs: Mapping[str, TensorRef], written: Mapping[str, WrittenTensor]
) -> list[LayerRead]:
    """The reads that fill the memory of a layer.

    Args:
        layer: the layer.
        refs: where the tensors of the checkpoint lie.
        written: what the manifest says of them; empty for no checksums.
    """
    matrix = layer.intermediate * layer.hidden
    reads: list[LayerRead] = []
    if layer.layout == "fused":
        for name, at in (
            (layer.projection("gate", 0).names.weight, 0),
            (layer.projection("down", 0).names.weight, w2_offset(layer)),
        ):
            reads += _reads(name, refs[name], 0, refs[name].nbytes, at, written.get(name))
        return reads
    for role in ROLES:
        base, stride = (w2_offset(layer), matrix) if role == "down" else (matrix if role == "up" else 0, 2 * matrix)
        for expert in range(layer.experts):
            name = layer.projection(role, expert).names.weight
            first = 0 if layer.layout == "per_expert" else expert * matrix
            known = written.get(name) if layer.layout == "per_expert" else None  # of a stack, only parts lie together
            reads += _reads(name, refs[name], first, matrix, base + expert * stride, known)
    return reads


def covered(layer: MoELayer, written: Mapping[str, WrittenTensor]) -> set[str]:
    """The tensors of a layer whose every byte is compared with the manifest while the layer is read."""
    if layer.layout == "stacked":
        return set()
    names = {layer.projection(role, expert).names.weight for role in ROLES for expert in range(layer.experts)}
    return {name for name in names if name in written}


def written_tensors(manifest: Manifest | None) -> dict[str, WrittenTensor]:
    """Name -> what the manifest says of a tensor."""
    return {} if manifest is None else {tensor.name: tensor for shard in manifest.shards for tensor in shard.tensors}


def _reads(
    name: str, ref: TensorRef, first: int, nbytes: int, at: int, written: WrittenTensor | None
) -> Iterator[LayerRead]:
    if written is not None:
        for item in written.pieces:
            size = item.piece.output_nbytes
            yield LayerRead(name, ref.file, ref.start + first, size, at, item.checksum, item.piece.tensor)
            first, at = first + size, at + size
        return
    for start in range(0, nbytes, CHUNK_BYTES):
        size = min(CHUNK_BYTES, nbytes - start)
        yield LayerRead(name, ref.file, ref.start + first + start, size, at + start)
