"""Values of scales and other small tensors, in bytes.

Where their upper bytes are usual, as nearly always, no value is decoded.
"""

from __future__ import annotations

import math
from array import array
from typing import Final

from quarkconv.dtypes import DTYPE_BITS, widen_bf16, widen_f16

_F32: Final = 4
_LARGE: Final = (0x7F, 0xFF)
"""Upper bytes of values of 2^127 and more in F32 or BF16, infinities and NaN among them."""
_SMALL: Final = (0x00, 0x80)
"""Upper bytes of F32 values below 2^-125, zeros among them."""
SIGNED_ZEROS: Final = ("F32", "BF16", "F16")
"""Dtypes with a zero of either sign."""
_WITHOUT_SIGN: Final = bytes(byte & 0x7F for byte in range(256))


def are_usual(values: bytes | bytearray) -> bool:
    """Whether all of these F32 values are positive, and neither tiny nor huge, so that they need no other test."""
    upper = values[_F32 - 1 :: _F32]
    return upper.isascii() and 0 not in upper and 0x7F not in upper


def are_finite(values: bytes | bytearray, dtype: str = "F32") -> bool:
    """Whether all of these floats are finite; of F32, BF16 or F16."""
    size = DTYPE_BITS[dtype] // 8
    upper = values[size - 1 :: size]
    if dtype != "F16" and not any(byte in upper for byte in _LARGE):
        return True
    wide = {"BF16": widen_bf16, "F16": widen_f16}.get(dtype, bytes)(bytes(values))
    return all(map(math.isfinite, array("f", wide)))


def are_zeros(values: bytes | bytearray, dtype: str) -> bool:
    """Whether all values of a tensor are zero; -0.0 is, in F32, BF16 or F16."""
    if not any(values):
        return True
    if dtype not in SIGNED_ZEROS:
        return False
    upper = DTYPE_BITS[dtype] // 8 - 1
    magnitudes = bytearray(values)
    magnitudes[upper :: upper + 1] = magnitudes[upper :: upper + 1].translate(_WITHOUT_SIGN)
    return not any(magnitudes)


def are_positive(values: bytes | bytearray) -> bool:
    """Whether all of these finite F32 values are positive."""
    upper = values[_F32 - 1 :: _F32]
    return (upper.isascii() and 0 not in upper) or min(array("f", bytes(values))) > 0


def zeros(values: bytes | bytearray) -> list[int]:
    """Positions of the zeros among F32 values."""
    upper = values[_F32 - 1 :: _F32]
    if not any(byte in upper for byte in _SMALL):
        return []
    return [position for position, value in enumerate(array("f", bytes(values))) if value == 0]
