"""The computations of a plan, a block at a time, so that memory does not grow with the tensor."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Final

from quarkconv.dtypes import widen_bf16, widen_f16
from quarkconv.plan.pieces import CodeColumns, Codes, Columns, Copy, Rows, RowScales, Scale, Weights, Zeros
from quarkconv.scheme.scale_values import zeros
from quarkconv.write.checked_scales import check_scale, zero_scale
from quarkconv.write.held_scales import HeldScales
from quarkconv.write.quantizing import quantized_codes, row_scales
from quarkconv.write.source import Reader, read

BLOCK_BYTES: Final = 2**20
"""Source bytes that are read at a time, at least a row."""
_CODES_AT_ONCE: Final = 96 * 2**10
"""Codes that become weights at a time: few enough to stay in a CPU's cache as F32."""


def transformed(
    piece: Rows | Weights | Columns | Codes | CodeColumns | RowScales | Zeros,
    reader: Reader,
    held: HeldScales | None = None,
) -> Iterator[bytes | bytearray | memoryview]:
    """The output bytes of a piece that is computed, in order.

    Args:
        piece: the piece.
        reader: reads its ranges.
        held: scales that are computed together with codes; by default none is held.

    Raises:
        SourceError: reading failed, or a scale by which codes are multiplied is not finite, or zero where they are not.
        UnsupportedError: a row of a float weight cannot be quantized.
    """
    held = held or HeldScales()
    match piece:
        case Rows():
            yield _f32(piece, reader)
        case Weights(codes, scale):
            with _alone:
                yield from _products(codes, scale, reader)
        case Columns():
            yield from _runs(piece, reader)
        case Codes() | CodeColumns():
            yield from quantized_codes(piece, reader, held)
        case RowScales():
            yield from row_scales(piece, reader, held)
        case Zeros(_, nbytes):
            for start in range(0, nbytes, BLOCK_BYTES):
                yield bytes(min(BLOCK_BYTES, nbytes - start))


def scale_elements(piece: Scale, reader: Reader) -> Iterator[bytes | bytearray]:
    """The elements of a scale as F32, in order and a block at a time; each once, however often it is written.

    Raises:
        SourceError: reading failed.
    """
    match piece:
        case Rows(source, widen, _):
            yield _f32(Rows(source, widen, 1), reader)
        case Copy(_, _, _, nbytes):
            for start in range(0, nbytes, BLOCK_BYTES):
                yield read(reader, piece, start, min(BLOCK_BYTES, nbytes - start))


def _f32(scale: Scale, reader: Reader) -> bytes:
    """A scale as F32 rows. Exact: F32 has every value of BF16 and F16."""
    data = bytes(read(reader, scale.source))
    match scale:
        case Copy():
            return data
        case Rows(_, "BF16", repeat):
            return widen_bf16(data) * repeat
        case Rows(_, "F16", repeat):
            return widen_f16(data) * repeat
        case Rows(_, _, repeat):
            return data * repeat


def _products(source: Copy, scale: Scale, reader: Reader) -> Iterator[memoryview]:
    """Codes times the scales of their rows, in F32, rounded once to BF16, to nearest and ties to even."""
    import torch

    factors = bytearray(_f32(scale, reader))
    count = len(factors) // 4
    check_scale(scale.source, factors)
    has_zeros = bool(zeros(factors))
    columns = source.nbytes // count if count else 0
    rows = max(1, BLOCK_BYTES // max(1, columns))
    few = max(1, _CODES_AT_ONCE // max(1, columns))
    for first in range(0, count if columns else 0, rows):
        block = min(rows, count - first)
        codes = torch.frombuffer(read(reader, source, first * columns, block * columns), dtype=torch.int8)
        codes = codes.view(block, columns)
        scales = torch.frombuffer(factors, dtype=torch.float32, count=block, offset=4 * first).unsqueeze(1)
        if has_zeros and bool(codes[(scales == 0).flatten()].any()):
            raise zero_scale(scale.source, source)
        result = bytearray(2 * block * columns)
        weights = torch.frombuffer(result, dtype=torch.bfloat16).view(block, columns)
        for row in range(0, block, few):
            part = slice(row, row + few)
            weights[part] = codes[part].float().mul_(scales[part])
        yield memoryview(result)


class _Alone:
    """Keeps torch from using threads of its own while several of ours compute: they would wait for one another."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._before = 1

    def __enter__(self) -> None:
        import torch  # only this computation needs it, and importing it takes seconds

        with self._lock:
            if not self._inside:
                self._before = torch.get_num_threads()
            self._inside += 1
            torch.set_num_threads(1)

    def __exit__(self, *_: object) -> None:
        import torch

        with self._lock:
            self._inside -= 1
            if not self._inside:
                torch.set_num_threads(self._before)


_alone: Final = _Alone()


def _runs(piece: Columns, reader: Reader) -> Iterator[bytearray]:
    """The same bytes of many rows: whole rows are read, and their runs put together."""
    source, run, stride = piece
    rows = max(1, BLOCK_BYTES // stride)
    for first in range(0, piece.rows, rows):
        block = min(rows, piece.rows - first)
        data = read(reader, source, first * stride, (block - 1) * stride + run)
        yield bytearray().join(memoryview(data)[row * stride : row * stride + run] for row in range(block))
