"""Dtypes of the safetensors format: the type of a tensor, its size, and exact widening of 16-bit floats to F32.

Widening needs no torch, so that conversion does without it.
"""

from __future__ import annotations

import struct
from collections.abc import ItemsView, Iterator, Mapping, Sequence, ValuesView
from functools import cached_property
from itertools import chain
from math import prod
from typing import Final, NamedTuple

_DTYPES_OF_BITS: Final = {
    4: "F4",
    6: "F6_E2M3 F6_E3M2",
    8: "BOOL U8 I8 F8_E5M2 F8_E4M3 F8_E8M0 F8_E4M3FNUZ F8_E5M2FNUZ",
    16: "I16 U16 F16 BF16",
    32: "I32 U32 F32",
    64: "C64 F64 I64 U64",
}
DTYPE_BITS: Final = {dtype: bits for bits, dtypes in _DTYPES_OF_BITS.items() for dtype in dtypes.split()}
"""Bits per element of every dtype of the format."""

FLOAT_DTYPES: Final = frozenset({"BF16", "F16", "F32", "F64"})
"""Dtypes in which unquantized weights are stored."""

QUANTIZABLE: Final = frozenset({"BF16", "F16", "F32"})
"""Dtypes of weights that ``convert --quantize`` quantizes."""

MAX_DIMENSIONS: Final = 64
_MAX_SIZE: Final = 2**64 - 1


class TensorType(NamedTuple):
    """Dtype and shape of a tensor, outermost dimension first; the shape of a scalar is ``()``."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def bits(self) -> int:
        """Size in bits."""
        return prod(self.shape) * DTYPE_BITS[self.dtype]

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.bits // 8


class TensorTypes(Mapping[str, TensorType]):
    """Name -> dtype and shape of every tensor of several files. Of a name that occurs twice, the last type counts.

    A dict of 100,000 names is larger than a processor's caches, and takes as long as a quarter of the headers that the
    names are from. ``inspect`` looks up few of them, most in their own file; so the dict is created after some look-ups
    in all files.

    Attributes:
        parts: name -> type, file by file; one part where a name occurs twice.
    """

    def __init__(self, parts: Sequence[Mapping[str, TensorType]]) -> None:
        self.parts = parts
        self._few = 1000  # look-ups in all files that are left until the dict is worth its time
        self._length = len(set[str]().union(*parts))
        if self._length != sum(map(len, parts)):
            self.parts = (self._all,)

    @cached_property
    def _all(self) -> dict[str, TensorType]:
        return dict(chain.from_iterable(part.items() for part in self.parts))

    def __len__(self) -> int:
        return self._length

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(self.parts)

    def __contains__(self, name: object) -> bool:
        return any(name in part for part in self.parts)

    def __getitem__(self, name: str) -> TensorType:
        if self._few > 0:
            self._few -= 1
            for part in self.parts:
                if name in part:
                    return part[name]
            raise KeyError(name)
        return self._all[name]

    def items(self) -> ItemsView[str, TensorType]:
        """As of a dict."""
        return self._all.items()

    def values(self) -> ValuesView[TensorType]:
        """As of a dict."""
        return self._all.values()


def is_tensor_type(found: TensorType) -> bool:
    """True for a dtype of the format and a shape that a tensor can have."""
    return (
        found.dtype in DTYPE_BITS
        and len(found.shape) <= MAX_DIMENSIONS
        and min(found.shape, default=0) >= 0
        and not overflows(found)
    )


def overflows(found: TensorType) -> bool:
    """True when a size does not fit in 64 bits while it is multiplied up, even if a later factor is 0."""
    count = 1
    for size in found.shape:  # stops at once: the numbers may have thousands of digits each
        count *= size
        if size > _MAX_SIZE or count > _MAX_SIZE:
            return True
    return count * DTYPE_BITS[found.dtype] > _MAX_SIZE


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
