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

if TYPE_CHECKING:
    from torch import Tensor

BLOCK_BYTES: Final = 2**18
"""Source bytes that are read at a time, at least a row."""
_STEPS: Final = 127.5
_LEAST_CODE, _GREATEST_CODE = -128, 127


class Reader(Protocol):
    """Reads byte ranges of a source."""

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a range from ``offset`` on."""


def quantized_codes(piece: Codes, reader: Reader) -> Iterator[memoryview]:
    """The I8 codes of the rows of a float weight, a block at a time."""
    import torch

    for weight in _blocks(piece, reader):
        scale = _scales(weight).float()
        values = weight.float().mul_(scale.reciprocal().unsqueeze(1))
        codes = values.round_().clamp_(_LEAST_CODE, _GREATEST_CODE).to(torch.int8)
        yield _bytes(codes)


def row_scales(piece: RowScales, reader: Reader) -> Iterator[memoryview]:
    """The F32 scales of the rows of a float weight, a block at a time."""
    for weight in _blocks(piece, reader):
        yield _bytes(_scales(weight).float())


def check_rows(piece: RowScales, reader: Reader) -> None:
    """Refuse a weight with rows that cannot be quantized.

    Raises:
        UnsupportedError: a row is all zero, or holds NaN or an infinity.
    """
    row = 0
    for weight in _blocks(piece, reader):
        scale = _scales(weight).float()
        bad = ~(scale.isfinite() & (scale > 0))
        if bool(bad.any()):
            first = int(bad.nonzero()[0])
            what = (
                "zeros only, or smaller values than a scale can have" if bool(scale[first] == 0) else "NaN or infinity"
            )
            raise UnsupportedError(
                "A row of this weight cannot be quantized",
                file=piece.source.file,
                tensor=piece.source.tensor,
                expected="finite values, not all of them zero",
                found=f"row {row + first} of the expert or linear: {what}",
                hint="exclude the module, or fix the weight",
            )
        row += len(scale)


def _scales(weight: Tensor) -> Tensor:
    return weight.abs().amax(dim=1).div_(_STEPS)


def _blocks(piece: Codes | RowScales, reader: Reader) -> Iterator[Tensor]:
    """Rows of a weight, about a block at a time, in its dtype."""
    import torch

    source, dtype, columns = piece
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    row = columns * kind.itemsize
    step = max(1, BLOCK_BYTES // row) * row
    for offset in range(0, source.nbytes, step):
        data = bytearray(min(step, source.nbytes - offset))
        reader.fill(source, offset, memoryview(data))
        yield torch.frombuffer(data, dtype=kind).view(-1, columns)


def _bytes(tensor: Tensor) -> memoryview:
    import torch

    data = bytearray(tensor.nbytes)
    torch.frombuffer(data, dtype=tensor.dtype).copy_(tensor.flatten())
    return memoryview(data)
