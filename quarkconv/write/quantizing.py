"""Float weights to ptpc_int8 codes and scales, bit for bit as Quark 0.13 computes them file to file.

For a row w in the weight's dtype (BF16, F16 or F32):

    scale = max |w| / 127.5      in that dtype, then widened to F32
    code  = round(w * (1 / scale))    in F32, to nearest and ties to even, clamped to [-128, 127]

Source: amd-quark 0.13, ``torch/quantization/observer`` and ``tensor_quantize.py``; tests compare with its exports.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Final, Protocol

from quarkconv.errors import UnsupportedError
from quarkconv.plan.pieces import Codes, Copy, RowScales
from quarkconv.write.held_scales import HeldScales

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_ELEMENTS: Final = 2**17
"""Elements of a weight that are quantized at a time, at least a row: few enough to stay in a CPU's cache as F32."""
_STEPS: Final = 127.5
_GREATEST_CODE: Final = 127  # the least is reached: a scale may be rounded down, so that |w| / scale exceeds 127.5


class Reader(Protocol):
    """Reads byte ranges of a source."""

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a range from ``offset`` on."""


def quantized_codes(piece: Codes, reader: Reader, held: HeldScales) -> Iterator[memoryview]:
    """The I8 codes of the rows of a float weight, a block at a time; their scales are held if they are expected.

    A block is valid until the next one.

    Raises:
        UnsupportedError: a row is all zero, or holds NaN or an infinity.
    """
    import torch

    expected = held.expects(piece.source)
    rows = _Rows(piece)
    data = bytearray(rows.step * rows.columns)
    codes = torch.frombuffer(data, dtype=torch.int8).view(rows.step, rows.columns) if data else None
    for first, values in rows.blocks(reader):
        if codes is not None:
            factors = rows.scales[first : first + len(values)].reciprocal().unsqueeze_(1)
            codes[: len(values)].copy_(values.mul_(factors).round_().clamp_(max=_GREATEST_CODE))
            yield memoryview(data)[: values.numel()]
    rows.check()
    if expected:
        held.hold(piece.source, rows.scale_bytes())


def row_scales(piece: RowScales, reader: Reader, held: HeldScales) -> Iterator[bytes]:
    """The F32 scales of the rows of a float weight; computed where they are not held.

    Raises:
        UnsupportedError: a row is all zero, or holds NaN or an infinity.
    """
    yield held.take(piece.source) if held.expects(piece.source) else _computed(piece, reader).scale_bytes()


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
    """The rows of a float weight, and their scales: 4 bytes for each row are in memory, and one block of values.

    Attributes:
        columns: elements of a row.
        step: rows of a block.
        scales: F32 [rows], filled by :meth:`blocks`.
    """

    def __init__(self, piece: Codes | RowScales) -> None:
        import torch

        source, dtype, self.columns = piece
        self._source = source
        self._kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
        self._row = self.columns * self._kind.itemsize
        rows = source.nbytes // self._row
        self.step = min(max(1, BLOCK_ELEMENTS // self.columns), rows)
        self.scales = torch.empty(rows, dtype=torch.float32)

    def blocks(self, reader: Reader) -> Iterator[tuple[int, Tensor]]:
        """Number of the first row and F32 values of each block, which are valid until the next one."""
        import torch

        total = len(self.scales)
        if not total:
            return
        data = bytearray(self.step * self._row)
        view = memoryview(data)
        stored = torch.frombuffer(data, dtype=self._kind).view(self.step, self.columns)
        widened = torch.empty((self.step, self.columns), dtype=torch.float32)
        for first in range(0, total, self.step):
            count = min(self.step, total - first)
            reader.fill(self._source, first * self._row, view[: count * self._row])
            values = widened[:count].copy_(stored[:count])
            largest = torch.maximum(values.amax(1), values.amin(1).neg_())
            self.scales[first : first + count] = largest.to(self._kind).div_(_STEPS)  # exact: one of the elements
            yield first, values

    def check(self) -> None:
        """Refuse rows whose scale is zero or not finite."""
        bad = ~(self.scales.isfinite() & (self.scales > 0))
        if not bool(bad.any()):
            return
        row = int(bad.nonzero()[0])
        zero = bool(self.scales[row] == 0)
        what = "zeros only, or smaller values than a scale can have" if zero else "NaN or infinity"
        raise UnsupportedError(
            "A row of this weight cannot be quantized",
            file=self._source.file,
            tensor=self._source.tensor,
            expected="finite values, not all of them zero",
            found=f"row {row} of the expert or linear: {what}",
            hint="leave the module in float with --exclude, or fix the weight",
        )

    def scale_bytes(self) -> bytes:
        """The scales as they are stored."""
        import torch

        data = bytearray(self.scales.nbytes)
        if data:
            torch.frombuffer(data, dtype=torch.float32).copy_(self.scales)
        return bytes(data)
