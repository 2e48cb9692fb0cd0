"""Float weights to ptpc_int8 codes and scales, bit for bit as Quark 0.13 computes them file to file.

For a row w in the weight's dtype (BF16, F16 or F32):

    scale = max |w| / 127.5      in that dtype, then widened to F32
    code  = round(w * (1 / scale))    in F32, to nearest and ties to even, clamped to [-128, 127]

Source: amd-quark 0.13, ``torch/quantization/observer`` and ``tensor_quantize.py``; tests compare with its exports.

NumPy computes as fast as torch here, and is imported in a tenth of a second, where torch takes two.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, NamedTuple

from quarkconv.dtypes import DTYPE_BITS
from quarkconv.errors import UnsupportedError
from quarkconv.plan.pieces import CodeColumns, Codes, RowScales
from quarkconv.write.held_scales import HeldScales
from quarkconv.write.source import Reader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

BLOCK_ELEMENTS: Final = 2**17
"""Elements of a weight that are quantized at a time, at least a row: few enough to stay in a CPU's cache as F32."""
_BLOCKS_KEPT: Final = 4
_STEPS: Final = 127.5
_CODES: Final = (-128, 127)
_FLOATS: Final = {"F16": "f2", "F32": "f4"}
_INNER_LOOP: Final = 512
"""NumPy's buffer in elements. With the default, 8192, it multiplies rows of up to 4096 at a third of the speed."""


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
        import numpy as np

        scales = np.frombuffer(self.scales, np.float32)
        bad = ~(np.isfinite(scales) & (scales > 0))
        if not bad.any():
            return
        row = int(bad.argmax())
        what = "only zeros, or values too small for a scale" if scales[row] == 0 else "NaN or infinity"
        raise UnsupportedError(
            "A row of this weight cannot be quantized",
            file=self._source.file,
            tensor=self._source.tensor,
            expected="finite values, not all zero",
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
    """Rows of a weight, their scales and their codes. All weights of a shape share the memory.

    Attributes:
        stored: the rows as they are stored; fill it first.
    """

    def __init__(self, shape: _Shape) -> None:
        import numpy as np

        self._dtype, rows, columns, part = shape
        size = DTYPE_BITS[self._dtype] // 8
        data = bytearray(rows * columns * size)
        self.stored = memoryview(data)
        self._bits = np.frombuffer(data, f"u{size}").reshape(rows, columns)
        self._signed = self._bits.view(f"i{size}")
        self._magnitude = self._bits.dtype.type(2 ** (8 * size - 1) - 1)
        self._part = self._bits[:, part.start : part.stop]
        self._values = np.empty(self._part.shape, np.float32)
        self._scales = np.empty(rows, np.float32)
        self._codes = np.empty(self._part.shape, np.int8)

    def computed_scales(self) -> memoryview:
        """The F32 scales of all rows.

        Floats without a sign are in the order of their bits as integers, with infinity and NaN last. So the largest
        integer is that of the largest positive value, or is negative; without a sign, that of the most negative one.
        """
        import numpy as np

        positive = np.maximum(self._signed.max(axis=1), 0).view(self._bits.dtype)
        negative = self._bits.max(axis=1) & self._magnitude
        largest = np.maximum(positive, negative)
        with np.errstate(all="ignore"):
            if self._dtype == "BF16":
                quotients = (_widened(largest) / np.float32(_STEPS)).view(np.uint32)
                quotients += 0x7FFF + (quotients >> 16 & 1)  # to nearest, ties to even
                quotients &= 0xFFFF0000
                self._scales[:] = quotients.view(np.float32)
            else:
                peaks = largest.view(_FLOATS[self._dtype])
                self._scales[:] = peaks / peaks.dtype.type(_STEPS)
        return self._scales.data.cast("B")

    def quantized(self, count: int) -> memoryview:
        """The codes of the first ``count`` rows, whose scales are computed."""
        import numpy as np

        values = self._values
        with np.errstate(all="ignore"):
            if self._dtype == "BF16":
                _widened(self._part, values)
            else:
                np.copyto(values, self._part.view(_FLOATS[self._dtype]))
            usual = np.setbufsize(_INNER_LOOP)
            np.multiply(values, (1 / self._scales)[:, None], out=values)
            np.setbufsize(usual)
            np.rint(values, out=values)
            np.clip(values, *_CODES, out=values)
            np.copyto(self._codes, values, casting="unsafe")
        return self._codes[:count].data.cast("B")


def _widened(bits: NDArray[np.uint16], out: NDArray[np.float32] | None = None) -> NDArray[np.float32]:
    """The bits of BF16 as F32, which has their 16 bits in front."""
    import numpy as np

    out = np.empty(bits.shape, np.float32) if out is None else out
    words = out.view(np.uint32)
    np.copyto(words, bits)
    np.left_shift(words, 16, out=words)
    return out


class _ThreadBlocks(threading.local):
    """The blocks of a thread; they end with it."""

    def __init__(self) -> None:
        self.blocks: dict[_Shape, _Block] = {}


_thread: Final = _ThreadBlocks()


def _block(shape: _Shape) -> _Block:
    """A block of this thread, which all weights of a shape share."""
    blocks = _thread.blocks
    if shape not in blocks:
        if len(blocks) == _BLOCKS_KEPT:
            blocks.clear()
        blocks[shape] = _Block(shape)
    return blocks[shape]
