"""16-bit floats to F32, exactly, and without torch: what scales in narrow dtypes need."""

from __future__ import annotations

import struct
from typing import Final

_SIZE: Final = 2


def widen_bf16(data: bytes) -> bytes:
    """BF16 to F32, little-endian: BF16 is the upper half of the F32 of the same value."""
    wide = bytearray(2 * len(data))
    wide[2::4] = data[0::_SIZE]
    wide[3::4] = data[1::_SIZE]
    return bytes(wide)


def widen_f16(data: bytes) -> bytes:
    """F16 to F32, little-endian: every value of F16 is one of F32."""
    count = len(data) // _SIZE
    return struct.pack(f"<{count}f", *struct.unpack(f"<{count}e", data))
