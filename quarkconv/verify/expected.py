"""The bytes that a piece of the output must have, computed from the source with torch, a block at a time.

The code that wrote the output shares nothing with this.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

import torch

from quarkconv.load.open_files import FileReads, OpenFile
from quarkconv.plan.pieces import CodeColumns, Codes, Columns, Copy, Piece, Rows, RowScales, Scale, Weights, Zeros

_BLOCK: Final = 8 * 2**20
_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "": torch.uint8}


def expected_bytes(sources: FileReads, piece: Piece) -> Iterator[bytes]:
    """The expected bytes of a piece, block by block, computed independently of the writer."""
    match piece:
        case Copy(_, file, start, nbytes):
            yield from read_blocks(OpenFile(sources, file), start, nbytes)
        case Rows():
            yield _bytes_of(_expected_rows(sources, piece))
        case Weights(codes, scale):
            yield from _expected_weights(sources, codes, scale)
        case Columns():
            yield from _expected_columns(OpenFile(sources, piece.source.file), piece)
        case Codes() | RowScales():
            yield from map(_bytes_of, _expected_quantized(OpenFile(sources, piece.source.file), piece))
        case CodeColumns(codes, first, count):
            for block in _expected_quantized(OpenFile(sources, piece.source.file), codes):
                yield _bytes_of(block[:, first : first + count])
        case Zeros(_, nbytes):
            yield from (b"\0" * min(_BLOCK, nbytes - start) for start in range(0, nbytes, _BLOCK))


def read_blocks(file: OpenFile, start: int, nbytes: int) -> Iterator[bytes]:
    """A byte range, a block at a time; shorter where the file ends."""
    end = start + nbytes
    while start < end:
        block = file.read(start, min(_BLOCK, end - start))
        if not block:
            return
        yield block
        start += len(block)


def _expected_rows(sources: FileReads, scale: Scale) -> torch.Tensor:
    """A scale as F32, repeated: by torch, where the writer computes it from bits."""
    _, file, start, nbytes = scale.source
    data = bytearray().join(read_blocks(OpenFile(sources, file), start, nbytes))
    widen, repeat = (scale.widen, scale.repeat) if isinstance(scale, Rows) else ("", 1)
    elements = torch.frombuffer(data, dtype=_DTYPES[widen])
    return (elements.float() if widen else elements).repeat(repeat)


def _expected_weights(sources: FileReads, codes_range: Copy, scale: Scale) -> Iterator[bytes]:
    """Code times scale, rounded to F32, then to BF16: exact products in float64, rounding on the bits."""
    _, file, begin, length = codes_range
    if not length:
        return
    scales = _expected_rows(sources, scale).view(torch.float32).double()
    columns = length // len(scales)
    rows = max(1, _BLOCK // (8 * columns))
    for first in range(0, len(scales), rows):
        some = scales[first : first + rows].unsqueeze(1)
        start, nbytes = begin + first * columns, len(some) * columns
        data = bytearray().join(read_blocks(OpenFile(sources, file), start, nbytes))
        codes = torch.frombuffer(data, dtype=torch.int8)
        bits = (codes.view(len(some), columns).double() * some).float().view(torch.int32).long() & 0xFFFFFFFF
        yield _bytes_of(((bits + 0x7FFF + (bits >> 16 & 1)) >> 16).to(torch.uint16))


def _expected_quantized(file: OpenFile, piece: Codes | RowScales) -> Iterator[torch.Tensor]:
    """Codes or scales of ptpc_int8: products and quotients in float64, rounded where the writer rounds."""
    source, dtype, columns = piece
    kind = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[dtype]
    row = columns * kind.itemsize
    step = max(1, _BLOCK // (8 * row)) * row
    for first in range(source.start, source.start + source.nbytes, step):
        nbytes = min(step, source.start + source.nbytes - first)
        data = bytearray().join(read_blocks(file, first, nbytes))
        weight = torch.frombuffer(data, dtype=kind).view(-1, columns).double()
        largest = torch.maximum(weight.max(dim=1).values, -weight.min(dim=1).values)
        scale = (largest / 127.5).float().to(kind).float()
        if isinstance(piece, RowScales):
            yield scale
            continue
        inverse = (1.0 / scale.double()).float().double()
        products = (weight * inverse.unsqueeze(1)).float().double()
        floor = products.floor()
        above = products - floor
        up = (above > 0.5) | ((above == 0.5) & (floor.remainder(2) == 1))
        yield (floor + up).clamp(-128, 127).to(torch.int8)


def _expected_columns(file: OpenFile, piece: Columns) -> Iterator[bytes]:
    """The same columns of many rows, as a strided view of them."""
    source, run, stride = piece
    count, at_once = -(-source.nbytes // stride), max(1, _BLOCK // stride)
    for first in range(0, count, at_once):
        rows = min(at_once, count - first)
        data = bytearray().join(read_blocks(file, source.start + first * stride, (rows - 1) * stride + run))
        view = torch.frombuffer(data, dtype=torch.uint8).as_strided((rows, run), (stride, 1))
        yield _bytes_of(view)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    result = bytearray(tensor.nbytes)
    if result:
        torch.frombuffer(result, dtype=torch.uint8).copy_(tensor.contiguous().view(torch.uint8).flatten())
    return bytes(result)
