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

    Raises:
        UnsupportedError: a row is all zero, or holds NaN or an infinity.
    """
    import torch

    expected = held.expects(piece.source)
    scales = bytearray()
    for weight, values, scale in _blocks(piece, reader):
        values.mul_(scale.reciprocal().unsqueeze(1)).round_().clamp_(max=_GREATEST_CODE)
        data = bytearray(weight.numel())
        torch.frombuffer(data, dtype=torch.int8).view(weight.shape).copy_(values)
        yield memoryview(data)
        if expected:
            scales += _bytes(scale)
    if expected:
        held.hold(piece.source, bytes(scales))


def row_scales(piece: RowScales, reader: Reader, held: HeldScales) -> Iterator[bytes]:
    """The F32 scales of the rows of a float weight, a block at a time where they are not held.

    Raises:
        UnsupportedError: a row is all zero, or holds NaN or an infinity.
    """
    scales = held.take(piece.source)
    if scales is not None:
        yield scales
        return
    for _, _, scale in _blocks(piece, reader):
        yield _bytes(scale)


def check_rows(piece: RowScales, reader: Reader) -> None:
    """Refuse a weight with rows that cannot be quantized.

    Raises:
        UnsupportedError: a row is all zero, or holds NaN or an infinity.
    """
    for _ in _blocks(piece, reader):
        pass


def _blocks(piece: Codes | RowScales, reader: Reader) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Rows of a weight, about a block at a time: in its dtype, in F32, and their scales in F32.

    The tensors are valid until the next block.
    """
    import torch

    source, dtype, columns = piece
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    total = source.nbytes // (columns * kind.itemsize)
    if not total:
        return
    rows = min(max(1, BLOCK_ELEMENTS // columns), total)
    data = bytearray(rows * columns * kind.itemsize)
    stored = torch.frombuffer(data, dtype=kind).view(rows, columns)
    widened = torch.empty((rows, columns), dtype=torch.float32)
    for first in range(0, total, rows):
        count = min(rows, total - first)
        reader.fill(source, first * columns * kind.itemsize, memoryview(data)[: count * columns * kind.itemsize])
        weight, values = stored[:count], widened[:count].copy_(stored[:count])
        largest = torch.maximum(values.amax(1), values.amin(1).neg_()).to(kind)  # exact: it is an element, or minus one
        scale = largest.div_(_STEPS).float()
        _check(scale, piece, first)
        yield weight, values, scale


def _check(scale: Tensor, piece: Codes | RowScales, row: int) -> None:
    """Refuse scales that are zero or not finite; ``row`` is the first row's number."""
    bad = ~(scale.isfinite() & (scale > 0))
    if not bool(bad.any()):
        return
    first = int(bad.nonzero()[0])
    zero = bool(scale[first] == 0)
    what = "zeros only, or smaller values than a scale can have" if zero else "NaN or infinity"
    raise UnsupportedError(
        "A row of this weight cannot be quantized",
        file=piece.source.file,
        tensor=piece.source.tensor,
        expected="finite values, not all of them zero",
        found=f"row {row + first} of the expert or linear: {what}",
        hint="leave the module in float with --exclude, or fix the weight",
    )


def _bytes(scale: Tensor) -> bytes:
    """The bytes of F32 scales."""
    import torch

    data = bytearray(scale.nbytes)
    torch.frombuffer(data, dtype=torch.float32).copy_(scale)
    return bytes(data)
