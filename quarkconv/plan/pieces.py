"""A plan as data: output files made of tensors, tensors made of pieces of source files.

A plan says everything that a conversion does, and doing it takes no further decision. It is made from headers alone
and survives a round trip through JSON; the same source and options give the same plan, wherever the files lie.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal, NamedTuple

from quarkconv.experts.ranks import WHOLE, Rank
from quarkconv.findings import Finding
from quarkconv.headers.safetensors import TensorRef

PLAN_FORMAT: Final = 1


class Piece(NamedTuple):
    """A run of output bytes: a byte range of a source file, or a small computation on one.

    Three computations exist, and a piece has at most one of them; without any the bytes are copied.

    - Scales become F32 rows: each element is widened from ``widen`` to F32, if that is set, and the result is written
      ``repeat`` times.
    - Codes become weights: the I8 codes of a row are multiplied in F32 by the row's scale, and rounded to BF16.
    - Columns are cut out: runs of ``run`` bytes, each ``stride`` bytes after the start of the last, are put together.

    Attributes:
        tensor: source tensor that the range belongs to.
        file: source file.
        start: first byte in the file.
        nbytes: bytes that are taken: the length of the range, or of all runs together.
        widen: ``BF16`` or ``F16`` when elements of that dtype become F32; empty for a copy.
        repeat: how many times the result is written, one after the other.
        scale: the piece that gives the rows' scales as F32, when codes become weights.
        run, stride: length of a run and distance between two of them, when columns are cut out; else 0.
    """

    tensor: str
    file: str
    start: int
    nbytes: int
    widen: str = ""
    repeat: int = 1
    scale: Piece | None = None
    run: int = 0
    stride: int = 0

    @property
    def output_nbytes(self) -> int:
        """Length of what the piece contributes to its output tensor."""
        return self.nbytes * (2 if self.widen or self.scale else 1) * self.repeat

    @property
    def is_copy(self) -> bool:
        """True when the output bytes are those of one range, as they are."""
        return not self.widen and self.repeat == 1 and self.scale is None and not self.run

    @property
    def span(self) -> int:
        """Bytes from the first one that is taken to the last, those between runs included."""
        return (self.nbytes // self.run - 1) * self.stride + self.run if self.run else self.nbytes

    def ranges(self) -> tuple[Piece, ...]:
        """The piece itself, and the one that it takes its scales from."""
        return (self,) if self.scale is None else (self, self.scale)

    @classmethod
    def whole(cls, name: str, ref: TensorRef) -> Piece:
        """The copy of a whole tensor."""
        return cls(name, ref.file, ref.start, ref.nbytes)


class OutputTensor(NamedTuple):
    """A tensor of the output: its name, dtype and shape, and the pieces that fill it, in order."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return sum(piece.output_nbytes for piece in self.pieces)


@dataclass(frozen=True, slots=True)
class OutputShard:
    """A file of the output: a header of ``header`` bytes (with its length prefix), then the tensors in order."""

    file: str
    header: int
    tensors: tuple[OutputTensor, ...]

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.header + sum(tensor.nbytes for tensor in self.tensors)


class Check(NamedTuple):
    """What must hold of the source's data before the first byte is written.

    ``zero``: the bytes of ``first`` are all zero. ``equal``: the bytes of ``first`` and ``second`` are the same.
    ``repeats``: the bytes of ``first`` are those of ``second``, again and again.
    """

    kind: Literal["zero", "equal", "repeats"]
    first: Piece
    second: Piece | None = None


class SourceFile(NamedTuple):
    """A file of the source and the size that it had when the plan was made."""

    name: str
    size: int


class TextFile(NamedTuple):
    """A small file of the output, and what it says."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class MoEGeometry:
    """The experts of the converted model: E, k, H, I, the layers, and the names of their modules."""

    layers: tuple[int, ...]
    prefixes: tuple[str, ...]
    experts: int
    top_k: int | None
    hidden_size: int
    intermediate_size: int
    activation_function: str | None


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will do.

    Attributes:
        target: name of the target.
        scheme: scheme of the source.
        producer_version: version of the tool that quantized the source, where its config says so.
        max_shard_size: largest size of a shard's data in bytes; a larger tensor has a file of its own.
        moe: geometry of the experts.
        sources: the shards of the source.
        checks: what must hold of the source's data before anything is written.
        shards: the safetensors files to write.
        config: config.json to write.
        copies: files of the source that are copied as they are.
        losses: what the source says and the output does not.
        texts: files that are written anew, such as the model card.
        rank: the rank whose part of the experts is written.
    """

    target: str
    scheme: str
    producer_version: str | None
    max_shard_size: int
    moe: MoEGeometry
    sources: tuple[SourceFile, ...]
    checks: tuple[Check, ...]
    shards: tuple[OutputShard, ...]
    config: dict[str, Any]
    copies: tuple[SourceFile, ...]
    losses: tuple[Finding, ...] = ()
    texts: tuple[TextFile, ...] = ()
    rank: Rank = WHOLE

    def to_json(self) -> dict[str, Any]:
        """The plan as an object of JSON values; :meth:`from_json` gives an equal plan."""
        from quarkconv.plan.json import plan_to_json

        return plan_to_json(self)

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Plan:
        """The plan that :meth:`to_json` gave.

        Raises:
            SourceError: the object is not a plan, or of a format that this version does not know.
        """
        from quarkconv.plan.json import plan_from_json

        return plan_from_json(value)

    @property
    def output_bytes(self) -> int:
        """Bytes that the plan writes as shards, copies and texts; index, config and manifest come on top."""
        texts = sum(len(file.text.encode()) for file in self.texts)
        return sum(shard.nbytes for shard in self.shards) + sum(copy.size for copy in self.copies) + texts

    @property
    def tensor_bytes(self) -> int:
        """Bytes of all output tensors, without headers."""
        return sum(shard.nbytes - shard.header for shard in self.shards)
