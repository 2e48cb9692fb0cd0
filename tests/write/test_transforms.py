"""Widening scales, against torch, for every 16-bit pattern there is."""

from __future__ import annotations

import math
import struct
import tracemalloc
from collections.abc import Generator

import pytest
import torch

from quarkconv.dtypes import widen_bf16, widen_f16
from quarkconv.plan.pieces import Columns, Copy, Rows, Weights, f32_rows
from quarkconv.write.transforms import BLOCK_BYTES, transformed


class Memory:
    """Source bytes in memory: a range's ``file`` names which."""

    def __init__(self, **files: bytes) -> None:
        self.files = files

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:
        start = source.start + offset
        view[:] = self.files[source.file][start : start + len(view)]


def transform(piece: Rows, data: bytes) -> bytes:
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
    for pattern in nan:  # a NaN stays a NaN of the same sign; its payload is not compared
        assert found[pattern] & 0x7F800000 == 0x7F800000
        assert found[pattern] & 0x007FFFFF
        assert found[pattern] >> 31 == pattern >> 15
    numbers = set(range(65536)) - set(nan)
    assert [found[pattern] for pattern in numbers] == [expected[pattern] for pattern in numbers]


@pytest.mark.parametrize(("widen", "data"), [("", b"\1\2\3\4"), ("BF16", b"\x80\x3f"), ("F16", b"\x00\x3c")])
@pytest.mark.parametrize("repeat", [1, 3, 4096])
def test_the_result_is_repeated_and_as_long_as_planned(widen: str, data: bytes, repeat: int) -> None:
    piece = Rows(Copy("scale", "file", 0, len(data)), widen, repeat)
    out = transform(piece, data)
    assert len(out) == piece.output_nbytes
    one = b"\1\2\3\4" if not widen else struct.pack("<f", 1.0)
    assert out == one * repeat


def test_several_elements_are_repeated_as_a_whole() -> None:
    out = transform(Rows(Copy("scale", "file", 0, 4), "BF16", 2), struct.pack("<2H", 0x3F80, 0xFF80))
    assert struct.unpack("<4f", out) == (1.0, -math.inf, 1.0, -math.inf)


def test_nothing_stays_nothing() -> None:
    assert widen_bf16(b"") == widen_f16(b"") == transform(Rows(Copy("scale", "file", 0, 0), "", 5), b"") == b""


# Codes that become weights


def weights(
    rows: int, columns: int, scale_dtype: str = "F32", per_row: bool = True
) -> tuple[Weights, Memory, torch.Tensor]:
    """A piece, the files it reads, and what it must give: the product in float64, rounded to F32 and then to BF16."""
    generator = torch.Generator().manual_seed(rows * 1000 + columns)
    codes = torch.randint(-128, 128, (rows, columns), generator=generator, dtype=torch.int8)
    count = rows if per_row else 1
    dtype = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}[scale_dtype]
    scales = (torch.rand(count, generator=generator) + 1e-3).to(dtype)
    data = bytes(scales.view(torch.uint8).tolist())
    scale = f32_rows(Copy("scale", "scales", 3, len(data)), scale_dtype, 1 if per_row else rows)
    memory = Memory(codes=b"xxxxx" + codes.numpy().tobytes(), scales=b"xxx" + data)
    expected = (codes.double() * scales.double().unsqueeze(1)).float().bfloat16()
    return Weights(Copy("weight", "codes", 5, rows * columns), scale), memory, expected


@pytest.mark.parametrize(("rows", "columns"), [(1, 1), (3, 7), (64, 33), (500, 40), (2, 5000)])
@pytest.mark.parametrize("scale_dtype", ["F32", "BF16", "F16"])
@pytest.mark.parametrize("per_row", [True, False])
@pytest.mark.parametrize("block", [1, 1000, 2**20])
def test_codes_become_weights(
    monkeypatch: pytest.MonkeyPatch, rows: int, columns: int, scale_dtype: str, per_row: bool, block: int
) -> None:
    monkeypatch.setattr("quarkconv.write.transforms.BLOCK_BYTES", block)
    piece, memory, expected = weights(rows, columns, scale_dtype, per_row)
    found = b"".join(transformed(piece, memory))
    assert len(found) == piece.output_nbytes
    assert torch.equal(torch.frombuffer(bytearray(found), dtype=torch.bfloat16).view(rows, columns), expected)


def test_torch_has_its_threads_back_afterwards() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        piece, memory, _ = weights(500, 40)
        first, second = transformed(piece, memory), transformed(piece, memory)
        assert isinstance(first, Generator)
        assert isinstance(second, Generator)
        next(first)
        next(second)
        assert torch.get_num_threads() == 1
        first.close()
        assert torch.get_num_threads() == 1
        second.close()
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_weights_of_no_rows_and_of_no_columns_are_nothing() -> None:
    for rows in (0, 3):
        piece = Weights(Copy("weight", "codes", 0, 0), Copy("scale", "scales", 0, 4 * rows))
        assert b"".join(transformed(piece, Memory(codes=b"", scales=struct.pack("<f", 1.0) * rows))) == b""


@pytest.mark.parametrize("kind", ["weights", "columns"])
def test_memory_does_not_grow_with_the_piece(kind: str) -> None:
    rows, columns = 8192, 4096
    codes = bytes(rows * columns)
    memory = Memory(codes=codes, scales=struct.pack("<f", 1.0) * rows)
    source = Copy("weight", "codes", 0, rows * columns)
    piece: Weights | Columns = Weights(source, Copy("scale", "scales", 0, 4 * rows))
    if kind == "columns":
        piece = Columns(source._replace(nbytes=rows * columns - 2048), 2048, columns)
    for _ in transformed(piece, memory):  # what is imported on the way does not count
        break
    tracemalloc.start()
    total = sum(len(block) for block in transformed(piece, memory))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert total == piece.output_nbytes
    assert peak < 8 * BLOCK_BYTES < piece.source.nbytes


# Columns that are cut out


@pytest.mark.parametrize("block", [1, 50, 2**20])
@pytest.mark.parametrize(("rows", "columns", "first", "run"), [(1, 8, 0, 8), (5, 8, 3, 5), (40, 6, 5, 1), (3, 6, 0, 2)])
def test_columns_are_cut_out(
    monkeypatch: pytest.MonkeyPatch, block: int, rows: int, columns: int, first: int, run: int
) -> None:
    monkeypatch.setattr("quarkconv.write.transforms.BLOCK_BYTES", block)
    matrix = torch.arange(rows * columns, dtype=torch.int32).remainder(256).to(torch.uint8).view(rows, columns)
    memory = Memory(file=matrix.numpy().tobytes())
    piece = Columns(Copy("weight", "file", first, (rows - 1) * columns + run), run, columns)
    assert (piece.rows, piece.output_nbytes) == (rows, rows * run)
    expected = matrix[:, first : first + run].contiguous().numpy().tobytes()
    assert b"".join(map(bytes, transformed(piece, memory))) == expected
