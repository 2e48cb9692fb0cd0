"""Which bytes of which files hold the codes of a layer, and where they go in memory.

In memory the codes have the layout of the INT8 forward, for any layout on disk: w13 [E, 2I, H], or [E, I, H] of
experts without a gate, and from the next page on w2 [E, H, I]. Stacking experts costs nothing: each byte range is read
to its final place.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Final, NamedTuple

from quarkconv.experts.layer import MoELayer
from quarkconv.experts.naming import Role
from quarkconv.experts.ranks import WHOLE, Rank
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.manifest import Manifest, WrittenTensor
from quarkconv.plan.shards import PAGE

CHUNK_BYTES: Final = 16 * 2**20
"""Bytes of one read at most, so that several threads read a large tensor."""
_ALIGNED: Final = 64
"""Bytes that the start of a whole tensor in memory is a multiple of."""


class LayerPart(NamedTuple):
    """The part of a layer that a rank holds, and its place in memory: w13 first, w2 from the next page on.

    Attributes:
        layer: the layer.
        rank: the rank.
    """

    layer: MoELayer
    rank: Rank = WHOLE

    @property
    def experts(self) -> range:
        """Numbers of the rank's experts."""
        return self.rank.experts(self.layer.experts)

    @property
    def inner(self) -> range:
        """The rank's part of the intermediate size: rows of gate and up, columns of down."""
        return self.rank.intermediate(self.layer.intermediate)

    @property
    def matrix(self) -> int:
        """Bytes of one projection of one expert."""
        return len(self.inner) * self.layer.hidden

    @property
    def ups(self) -> tuple[Role, ...]:
        """The projections in w13, in order."""
        return self.layer.roles[:-1]

    @property
    def w13_nbytes(self) -> int:
        """Bytes of w13."""
        return len(self.ups) * len(self.experts) * self.matrix

    @property
    def w2_offset(self) -> int:
        """First byte of w2."""
        return -(-self.w13_nbytes // PAGE) * PAGE

    @property
    def nbytes(self) -> int:
        """Bytes of all codes in memory."""
        return self.w2_offset + len(self.experts) * self.matrix


class LayerRead(NamedTuple):
    """A byte range of a file, and its place in the memory of a layer.

    Attributes:
        tensor: the tensor that it belongs to.
        file: its file.
        start: first byte in the file.
        nbytes: length in the file.
        at: first byte in memory.
        checksum: its checksum in the manifest; empty if it has no manifest entry.
        source: the tensor of the source that it came from, for messages.
        run, stride: of every ``stride`` bytes of the file only the first ``run`` go to memory; 0 for all bytes.
    """

    tensor: str
    file: str
    start: int
    nbytes: int
    at: int
    checksum: str = ""
    source: str = ""
    run: int = 0
    stride: int = 0


def layer_reads(
    part: LayerPart, refs: Mapping[str, TensorRef], written: Mapping[str, WrittenTensor]
) -> Iterator[LayerRead]:
    """The reads that fill the memory of a layer, in the order of the files: a disk reads ahead.

    A tensor that is read from its first byte to its last, to one place, is read piece by piece of the manifest, with
    checksums; others are read in chunks.

    Args:
        part: the layer.
        refs: where the tensors of the checkpoint lie.
        written: the manifest's tensors; empty for no checksums.
    """
    for item in sorted(_joined(_projections(part, refs)), key=lambda item: (item.file, item.start)):
        tensor = written.get(item.tensor)
        if tensor is None or item.run or item.nbytes != refs[item.tensor].nbytes:
            yield from _chunks(item)
            continue
        start, at = item.start, item.at
        for piece, checksum in tensor.pieces:
            size = piece.output_nbytes
            yield LayerRead(item.tensor, item.file, start, size, at, checksum, piece.source.tensor)
            start, at = start + size, at + size


def tensor_reads(refs: Mapping[str, TensorRef]) -> tuple[list[LayerRead], dict[str, int], int]:
    """The reads that fill one memory with whole tensors.

    Tensors have the order of the files. Neighbours in a file that stay aligned are neighbours in memory as well, so
    that one read may go through many of them.

    Args:
        refs: the tensors, and where they lie.

    Returns:
        The reads, the first byte of each tensor in memory, and the bytes of the memory.
    """
    runs: list[LayerRead] = []
    places: dict[str, int] = {}
    at = 0
    for name, ref in sorted(refs.items(), key=lambda item: (item[1].file, item[1].start)):
        last = runs[-1] if runs else None
        if last is not None and (ref.file, ref.start) == (last.file, last.start + last.nbytes) and not at % _ALIGNED:
            runs[-1] = last._replace(nbytes=last.nbytes + ref.nbytes)
        else:
            at = -(-at // _ALIGNED) * _ALIGNED
            runs.append(LayerRead(name, ref.file, ref.start, ref.nbytes, at))
        places[name] = at
        at += ref.nbytes
    return [chunk for run in runs for chunk in _chunks(run)], places, at


def covered(part: LayerPart, refs: Mapping[str, TensorRef], written: Mapping[str, WrittenTensor]) -> set[str]:
    """The tensors of a layer whose every byte is compared with the manifest while the layer is read."""
    return {item.tensor for item in layer_reads(part, refs, written) if item.checksum}


def written_tensors(manifest: Manifest | None) -> dict[str, WrittenTensor]:
    """The tensors of a manifest by name."""
    return {} if manifest is None else {tensor.name: tensor for shard in manifest.shards for tensor in shard.tensors}


def _projections(part: LayerPart, refs: Mapping[str, TensorRef]) -> Iterator[LayerRead]:
    """One read for each projection of each expert, in the order of memory."""
    for position, expert in enumerate(part.experts):
        for at, role in enumerate(part.ups, len(part.ups) * position):
            yield _projection(part, refs, role, expert, at * part.matrix)
    for position, expert in enumerate(part.experts):
        yield _projection(part, refs, "down", expert, part.w2_offset + position * part.matrix)


def _projection(part: LayerPart, refs: Mapping[str, TensorRef], role: Role, expert: int, at: int) -> LayerRead:
    layer, stored = part.layer, part.layer.projection(role, expert)
    name = stored.names.weight
    ref = refs[name]
    start = ref.start + stored.weight.number * (ref.nbytes // stored.weight.of)
    inner, whole = part.inner, layer.intermediate
    if stored.alternate:
        row, stride = layer.hidden, stored.weight.of * layer.hidden
        start = ref.start + stored.weight.number * row + inner.start * stride
        return LayerRead(name, ref.file, start, (len(inner) - 1) * stride + row, at, run=row, stride=stride)
    if role != "down":
        return LayerRead(name, ref.file, start + inner.start * layer.hidden, part.matrix, at)
    if len(inner) == whole:
        return LayerRead(name, ref.file, start, part.matrix, at)
    span = (layer.hidden - 1) * whole + len(inner)
    return LayerRead(name, ref.file, start + inner.start, span, at, run=len(inner), stride=whole)


def _joined(reads: Iterator[LayerRead]) -> Iterator[LayerRead]:
    """The same reads, with neighbours in one tensor that are neighbours in memory as well made one."""
    last: LayerRead | None = None
    for item in reads:
        if last is None:
            last = item
        elif (
            item.tensor == last.tensor
            and not item.run
            and (item.start, item.at) == (last.start + last.nbytes, last.at + last.nbytes)
        ):
            last = last._replace(nbytes=last.nbytes + item.nbytes)
        else:
            yield last
            last = item
    if last is not None:
        yield last


def _chunks(item: LayerRead) -> Iterator[LayerRead]:
    if item.run:
        rows = -(-item.nbytes // item.stride)
        at_once = max(1, CHUNK_BYTES // item.stride)
        for first in range(0, rows, at_once):
            span = (min(at_once, rows - first) - 1) * item.stride + item.run
            yield item._replace(start=item.start + first * item.stride, nbytes=span, at=item.at + first * item.run)
        return
    for first in range(0, item.nbytes, CHUNK_BYTES):
        nbytes = min(CHUNK_BYTES, item.nbytes - first)
        yield item._replace(start=item.start + first, nbytes=nbytes, at=item.at + first)
