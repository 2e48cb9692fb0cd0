"""Float weights to ptpc_int8 codes and scales, bit for bit as Quark 0.13 computes them file to file.

For a row w in the weight's dtype (BF16, F16 or F32):

    scale = max |w| / 127.5      in that dtype, then widened to F32
    code  = round(w * (1 / scale))    in F32, to nearest and ties to even, clamped to [-128, 127]

Source: amd-quark 0.13, ``torch/quantization/observer`` and ``tensor_quantize.py``; tests compare with its exports.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final, NamedTuple, Protocol

from quarkconv.dtypes import DTYPE_BITS
from quarkconv.errors import UnsupportedError
from quarkconv.plan.pieces import CodeColumns, Codes, Copy, RowScales
from quarkconv.write.held_scales import HeldScales

BLOCK_ELEMENTS: Final = 2**17
"""Elements of a weight that are quantized at a time, at least a row: few enough to stay in a CPU's cache as F32."""
_BLOCKS_KEPT: Final = 4
_STEPS: Final = 127.5
_CODES: Final = (-128, 127)


class Reader(Protocol):
    """Reads byte ranges of a source."""

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a range from ``offset`` on."""


def quantized_codes(piece: Codes | CodeColumns, reader: Reader, held: HeldScales) -> Iterator[memoryview]:
    """The I8 codes of rows of a float weight, or of some of their columns, a block at a time.

    The scales of the rows are held if they are expected. A block is valid until this thread computes another one.

    Raises:
        UnsupportedError: a row is all zero, or holds NaN or an infinity.
    """
    expected = held.expects(piece.source)
    rows = _Rows(piece)
    for count, block in rows.blocks(reader):
        yield block.quantized(count)
    rows.check()
    if expected:
        held.hold(piece.source, bytes(rows.scales))


def row_scales(piece: RowScales, reader: Reader, held: HeldScales) -> Iterator[bytes]:
    """The F32 scales of the rows of a float weight; computed where they are not held.

    Raises:
        UnsupportedError: a row is all zero, or holds NaN or an infinity.
    """
    yield held.take(piece.source) if held.expects(piece.source) else bytes(_computed(piece, reader).scales)


def check_rows(piece: RowScales, reader: Reader) -> None:
    """Refuse a weight with rows that cannot be quantized.

    Raises:
        UnsupportedError: a row is all zero, or holds NaN or an infinity.
    """
    _computed(piece, reader)


def _computed(piece: RowScales, reader: Reader) -> _Rows:
    """The rows of a piece with all their scales."""
    rows = _Rows(piece)
    for _ in rows.blocks(reader):
        pass
    rows.check()
    return rows


class _Rows:
    """The rows of a float weight, and their scales: 4 bytes for each row are in memory, and one block.

    Attributes:
        scales: F32 of each row, filled by :meth:`blocks`.
    """

    def __init__(self, piece: Codes | CodeColumns | RowScales) -> None:
        match piece:
            case CodeColumns(codes, first, count):
                self._source, self._dtype, self._columns = codes
                self._part = range(first, first + count)
            case Codes() | RowScales():
                self._source, self._dtype, self._columns = piece
                self._part = range(self._columns)
        self._row = self._columns * DTYPE_BITS[self._dtype] // 8
        self._count = self._source.nbytes // self._row
        self.scales = bytearray(4 * self._count)

    def blocks(self, reader: Reader) -> Iterator[tuple[int, _Block]]:
        """Blocks with their scales computed, and how many of their rows are used; valid until the next one."""
        if not self._count:
            return
        most = max(1, BLOCK_ELEMENTS // self._columns)
        rows = -(-self._count // -(-self._count // most))  # about the same in each: a block is computed whole
        block = _block(_Shape(self._dtype, rows, self._columns, self._part))
        for first in range(0, self._count, rows):
            count = min(rows, self._count - first)
            reader.fill(self._source, first * self._row, block.stored[: count * self._row])
            self.scales[4 * first : 4 * (first + count)] = block.computed_scales()[: 4 * count]
            yield count, block

    def check(self) -> None:
        """Refuse rows whose scale is zero or not finite."""
        import torch

        if not self.scales:
            return
        scales = torch.frombuffer(self.scales, dtype=torch.float32)
        bad = ~(scales.isfinite() & (scales > 0))
        if not bool(bad.any()):
            return
        row = int(bad.nonzero()[0])
        zero = bool(scales[row] == 0)
        what = "zeros only, or smaller values than a scale can have" if zero else "NaN or infinity"
        raise UnsupportedError(
            "A row of this weight cannot be quantized",
            file=self._source.file,
            tensor=self._source.tensor,
            expected="finite values, not all of them zero",
            found=f"row {row} of the expert or linear: {what}",
            hint="leave the module in float with --exclude, or fix the weight",
        )


class _Shape(NamedTuple):
    """Dtype, rows and columns of a block, and the columns whose codes are needed."""

    dtype: str
    rows: int
    columns: int
    part: range


class _Block:
    """Memory for rows of one length, and views of it. All operations write to it, because for a block of this size
    creating tensors and views takes as long as computing.

    Attributes:
        stored: the rows as they are stored; fill it first.
    """

    def __init__(self, shape: _Shape) -> None:
        import torch

        dtype, rows, columns, part = shape

        kind, integer, self._magnitude = {
            "BF16": (torch.bfloat16, torch.int16, 0x7FFF),
            "F16": (torch.float16, torch.int16, 0x7FFF),
            "F32": (torch.float32, torch.int32, 0x7FFFFFFF),
        }[dtype]
        self._columns = len(part)
        data = bytearray(rows * columns * kind.itemsize)
        self.stored = memoryview(data)
        self._weights = torch.frombuffer(data, dtype=kind).view(rows, columns)
        self._bits = self._weights.view(integer)
        self._part = self._weights[:, part.start : part.stop]
        memory = torch.empty(rows * columns, dtype=torch.float32)  # of magnitudes first, then of values
        self._magnitudes = memory.view(integer)[: rows * columns].view(rows, columns)
        self._values = memory[: rows * len(part)].view(rows, len(part))
        self._largest = torch.empty(rows, dtype=integer)
        self._peaks = self._largest.view(kind)
        self._narrow = torch.empty(rows, dtype=kind)
        data = bytearray(4 * rows)
        self._scale_bytes = memoryview(data)
        self._scales = torch.frombuffer(data, dtype=torch.float32)
        self._reciprocals = torch.empty(rows, dtype=torch.float32)
        self._factors = self._reciprocals.unsqueeze(1)
        data = bytearray(rows * len(part))
        self._code_bytes = memoryview(data)
        self._codes = torch.frombuffer(data, dtype=torch.int8).view(rows, len(part))

    def computed_scales(self) -> memoryview:
        """The F32 scales of all rows.

        Floats without a sign are in the order of their bits as integers, with infinity and NaN last.
        """
        import torch

        torch.bitwise_and(self._bits, self._magnitude, out=self._magnitudes)
        torch.amax(self._magnitudes, 1, out=self._largest)
        torch.div(self._peaks, _STEPS, out=self._narrow)
        self._scales.copy_(self._narrow)
        return self._scale_bytes

    def quantized(self, count: int) -> memoryview:
        """The codes of the first ``count`` rows, whose scales are computed."""
        import torch

        torch.reciprocal(self._scales, out=self._reciprocals)
        values = self._values.copy_(self._part).mul_(self._factors)
        self._codes.copy_(values.round_().clamp_(*_CODES))
        return self._code_bytes[: count * self._columns]


class _Kept(threading.local):
    """The blocks of a thread; they end with it."""

    def __init__(self) -> None:
        self.blocks: dict[_Shape, _Block] = {}


_kept: Final = _Kept()


def _block(shape: _Shape) -> _Block:
    """A block of this thread, which all weights of a shape share."""
    blocks = _kept.blocks
    if shape not in blocks:
        if len(blocks) == _BLOCKS_KEPT:
            blocks.clear()
        blocks[shape] = _Block(shape)
    return blocks[shape]
