"""The small computations of a plan: scales to F32 rows. Exact, and without torch."""

from __future__ import annotations

import struct
from typing import Final

from quarkconv.plan.pieces import Piece

_HALF: Final = 2


def transform(piece: Piece, data: bytes) -> bytes:
    """The output bytes of a piece that is not a plain copy, from the bytes of its source range."""
    if piece.widen == "BF16":
        data = widen_bf16(data)
    elif piece.widen == "F16":
        data = widen_f16(data)
    return data * piece.repeat


def widen_bf16(data: bytes) -> bytes:
    """BF16 to F32, little-endian: BF16 is the upper half of the F32 of the same value."""
    wide = bytearray(2 * len(data))
    wide[2::4] = data[0::_HALF]
    wide[3::4] = data[1::_HALF]
    return bytes(wide)


def widen_f16(data: bytes) -> bytes:
    """F16 to F32, little-endian: every value of F16 is one of F32."""
    count = len(data) // _HALF
    return struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", data))
