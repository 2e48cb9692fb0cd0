"""The parts of a plan: output files consist of tensors, tensors of pieces of source files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from quarkconv.dtypes import DTYPE_BITS
from quarkconv.headers.safetensors import TensorRef


class Copy(NamedTuple):
    """A byte range of a source file. As a piece of the output: its bytes, unchanged.

    Attributes:
        tensor: source tensor that the range belongs to.
        file: source file.
        start: first byte in the file.
        nbytes: length.
    """

    tensor: str
    file: str
    start: int
    nbytes: int

    @property
    def source(self) -> Copy:
        """The range itself, under the name that it has in the other pieces."""
        return self

    @property
    def output_nbytes(self) -> int:
        """Bytes that the piece contributes to its output tensor."""
        return self.nbytes

    def reads(self) -> tuple[Copy, ...]:
        """The source ranges that are read, in this order."""
        return (self,)

    @classmethod
    def whole(cls, name: str, ref: TensorRef) -> Copy:
        """The copy of a whole tensor."""
        return cls(name, ref.file, ref.start, ref.nbytes)


class Rows(NamedTuple):
    """A scale as F32 rows: each element widened to F32, and the result written ``repeat`` times.

    Attributes:
        source: the elements.
        widen: ``BF16`` or ``F16``, the dtype of the elements; empty where they are F32 already.
        repeat: how many times the result is written, one after the other.
    """

    source: Copy
    widen: str
    repeat: int

    @property
    def output_nbytes(self) -> int:
        """Bytes that the piece contributes to its output tensor."""
        return self.source.nbytes * (2 if self.widen else 1) * self.repeat

    def reads(self) -> tuple[Copy, ...]:
        """The source ranges that are read, in this order."""
        return (self.source,)


class Weights(NamedTuple):
    """Codes as weights: the I8 codes of each row times the row's scale in F32, rounded to BF16.

    Attributes:
        source: the codes.
        scale: the piece that gives an F32 for each row.
    """

    source: Copy
    scale: Copy | Rows

    @property
    def output_nbytes(self) -> int:
        """Bytes that the piece contributes to its output tensor."""
        return 2 * self.source.nbytes

    def reads(self) -> tuple[Copy, ...]:
        """The source ranges that are read, in this order: scales first."""
        return self.scale.source, self.source


class Columns(NamedTuple):
    """The same columns of every row: runs of ``run`` bytes, each ``stride`` bytes after the start of the last.

    Attributes:
        source: the range from the first byte of the first run to the last byte of the last one.
        run: length of a run.
        stride: distance between the starts of two runs.
    """

    source: Copy
    run: int
    stride: int

    @property
    def rows(self) -> int:
        """Number of runs: one in every row."""
        return (self.source.nbytes - self.run) // self.stride + 1

    @property
    def output_nbytes(self) -> int:
        """Bytes that the piece contributes to its output tensor."""
        return self.rows * self.run

    def reads(self) -> tuple[Copy, ...]:
        """The source ranges that are read, in this order."""
        return (self.source,)


class _FloatRows(NamedTuple):
    """Whole rows of a float weight that is quantized to ptpc_int8, as Quark computes it.

    Attributes:
        source: the rows.
        dtype: of the weight: ``BF16``, ``F16`` or ``F32``.
        columns: elements of a row.
    """

    source: Copy
    dtype: str
    columns: int

    @property
    def elements(self) -> int:
        """Number of elements of all rows."""
        return self.source.nbytes // (DTYPE_BITS[self.dtype] // 8)

    def reads(self) -> tuple[Copy, ...]:
        """The source ranges that are read, in this order."""
        return (self.source,)


class Codes(_FloatRows):
    """The I8 codes of rows of a float weight."""

    __slots__ = ()

    @property
    def output_nbytes(self) -> int:
        """Bytes that the piece contributes to its output tensor."""
        return self.elements


class RowScales(_FloatRows):
    """The F32 scales of rows of a float weight, with which :class:`Codes` are computed."""

    __slots__ = ()

    @property
    def output_nbytes(self) -> int:
        """Bytes that the piece contributes to its output tensor."""
        return 4 * (self.elements // self.columns)


class CodeColumns(NamedTuple):
    """The same columns of the codes of every row. The rows' scales are those of all their columns.

    Attributes:
        codes: the codes of the whole rows.
        first: number of the first column.
        columns: number of columns.
    """

    codes: Codes
    first: int
    columns: int

    @property
    def source(self) -> Copy:
        """The rows."""
        return self.codes.source

    @property
    def output_nbytes(self) -> int:
        """Bytes that the piece contributes to its output tensor."""
        return self.codes.elements // self.codes.columns * self.columns

    def reads(self) -> tuple[Copy, ...]:
        """The source ranges that are read, in this order."""
        return self.codes.reads()


class Zeros(NamedTuple):
    """Zeros, such as the zero points of symmetric codes.

    Attributes:
        source: the codes that they belong to; not read.
        output_nbytes: length.
    """

    source: Copy
    output_nbytes: int

    def reads(self) -> tuple[Copy, ...]:
        """No range."""
        return ()


Scale = Copy | Rows
"""A piece that gives a scale as F32 rows."""

Piece = Copy | Rows | Weights | Columns | Codes | CodeColumns | RowScales | Zeros
"""A run of output bytes, computed from one or two ranges of source files."""


def f32_rows(source: Copy, dtype: str, repeat: int = 1) -> Scale:
    """A scale of a dtype as F32 rows; a copy where it is stored as such.

    Args:
        source: the elements.
        dtype: theirs: ``F32``, ``BF16`` or ``F16``.
        repeat: number of rows that share each scale.
    """
    widen = "" if dtype == "F32" else dtype
    return Rows(source, widen, repeat) if widen or repeat != 1 else source


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


class OutputShard(NamedTuple):
    """A file of the output: a header of ``header`` bytes (with its length prefix), then the tensors in order."""

    file: str
    header: int
    tensors: tuple[OutputTensor, ...]

    def pieces(self) -> Iterator[Piece]:
        """The pieces of all tensors, in order."""
        return (piece for tensor in self.tensors for piece in tensor.pieces)

    @property
    def nbytes(self) -> int:
        """Size of the file in bytes."""
        return self.header + sum(tensor.nbytes for tensor in self.tensors)


class Check(NamedTuple):
    """A condition on the source's data, checked before the first byte is written.

    ``zero``: the values of ``first`` are all zero; where -0.0 is one, its ``dtype`` is given. ``equal``: the bytes of
    ``first`` and ``second`` are the same. ``repeats``: the bytes of ``first`` are those of ``second``, again and again.
    ``finite``: ``first`` has no NaN and no infinity. A ``dtype`` is ``F32``, ``BF16`` or ``F16``.
    """

    kind: Literal["zero", "equal", "repeats", "finite"]
    first: Copy
    second: Copy | None = None
    dtype: str = ""

    def reads(self) -> tuple[Copy, ...]:
        """The source ranges that are read, in this order."""
        return (self.first,) if self.second is None else (self.first, self.second)


class SourceFile(NamedTuple):
    """A file of the source, and its size when it was planned."""

    name: str
    size: int


class TextFile(NamedTuple):
    """A small file of the output, and its text."""

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
