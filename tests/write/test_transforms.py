"""Widening scales, against torch, for every 16-bit pattern there is."""

from __future__ import annotations

import math
import struct

import pytest
import torch

from quarkconv.headers.widen import widen_bf16, widen_f16
from quarkconv.plan.pieces import Piece
from quarkconv.write.transforms import transformed


class Memory:
    """Source bytes in memory: a piece's ``file`` names which."""

    def __init__(self, **files: bytes) -> None:
        self.files = files

    def fill(self, piece: Piece, offset: int, view: memoryview) -> None:
        start = piece.start + offset
        view[:] = self.files[piece.file][start : start + len(view)]


def transform(piece: Piece, data: bytes) -> bytes:
    """The output of a piece of a file that holds ``data``."""
    return b"".join(transformed(piece, Memory(file=data)))


ALL = struct.pack("<65536H", *range(65536))


def widened_by_torch(dtype: torch.dtype) -> list[int]:
    """The bits of every pattern as F32."""
    values = torch.frombuffer(bytearray(ALL), dtype=torch.int16).view(dtype).float()
    return [bits & 0xFFFFFFFF for bits in values.view(torch.int32).tolist()]


def bits(data: bytes) -> list[int]:
    return list(struct.unpack(f"<{len(data) // 4}I", data))


def test_every_bf16_pattern_is_widened_as_torch_does() -> None:
    assert bits(widen_bf16(ALL)) == widened_by_torch(torch.bfloat16)


def test_every_f16_pattern_is_widened_as_torch_does() -> None:
    found, expected = bits(widen_f16(ALL)), widened_by_torch(torch.float16)
    nan = [pattern for pattern in range(65536) if pattern & 0x7C00 == 0x7C00 and pattern & 0x03FF]
    assert len(nan) == 2046
    for pattern in nan:  # a NaN stays a NaN of the same sign; its payload says nothing
        assert found[pattern] & 0x7F800000 == 0x7F800000
        assert found[pattern] & 0x007FFFFF
        assert found[pattern] >> 31 == pattern >> 15
    numbers = set(range(65536)) - set(nan)
    assert [found[pattern] for pattern in numbers] == [expected[pattern] for pattern in numbers]


@pytest.mark.parametrize(("widen", "data"), [("", b"\1\2\3\4"), ("BF16", b"\x80\x3f"), ("F16", b"\x00\x3c")])
@pytest.mark.parametrize("repeat", [1, 3, 4096])
def test_the_result_is_repeated_and_as_long_as_planned(widen: str, data: bytes, repeat: int) -> None:
    piece = Piece("scale", "file", 0, len(data), widen, repeat)
    out = transform(piece, data)
    assert len(out) == piece.output_nbytes
    one = b"\1\2\3\4" if not widen else struct.pack("<f", 1.0)
    assert out == one * repeat


def test_several_elements_are_repeated_as_a_whole() -> None:
    out = transform(Piece("scale", "file", 0, 4, "BF16", 2), struct.pack("<2H", 0x3F80, 0xFF80))
    assert struct.unpack("<4f", out) == (1.0, -math.inf, 1.0, -math.inf)


def test_nothing_stays_nothing() -> None:
    assert widen_bf16(b"") == widen_f16(b"") == transform(Piece("scale", "file", 0, 0, "", 5), b"") == b""
