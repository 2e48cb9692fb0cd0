"""Bytes: every piece of the output compared with the manifest's checksum, and with the source.

Ranges of the output follow from manifest and headers, checksums are computed again, and the bytes expected from the
source are computed with torch. The code that wrote the output shares nothing with this.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Final, NamedTuple

import torch
import xxhash

from quarkconv.defects import unreadable_tensor
from quarkconv.description.description import Description
from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.files.open_limit import hint_about_open_files
from quarkconv.load.open_files import BLOCK, FileReads, OpenFile, open_files
from quarkconv.plan.manifest import Manifest, WrittenPiece, WrittenShard, WrittenTensor
from quarkconv.plan.pieces import CodeColumns, Codes, Columns, Copy, Piece, Rows, RowScales, Scale, Weights, Zeros
from quarkconv.verify.places import wrong_pieces
from quarkconv.verify.results import BytesResult, Problem

_BLOCK: Final = 8 * 2**20
_DTYPES: Final = {"BF16": torch.bfloat16, "F16": torch.float16, "": torch.uint8}


def check_bytes(
    description: Description,
    manifest: Manifest,
    source: Files | None,
    progress: Callable[[int], None],
    jobs: int,
    skip: Collection[str],
    *,
    only: Collection[str] | None,
    fail_fast: bool,
) -> tuple[BytesResult, list[Problem]]:
    """Compare every byte of a converted checkpoint with its manifest, and with the source where there is one.

    Args:
        description: the converted checkpoint.
        manifest: its manifest.
        source: the files of the source, or None.
        progress: called with the number of bytes checked since its last call.
        jobs: number of tensors that are read at the same time.
        skip: tensors that were compared already; the result counts them too.
        only: the tensors, the shards whose headers, and the other files that are compared; None for all.
        fail_fast: stop reading after the first problem.

    Returns:
        What was compared, and a problem for each tensor that differs.

    Raises:
        SourceError: a file cannot be read, or the source is not the one that was converted.
    """
    store = description.checkpoint.store
    if source is not None:
        check_source(source, manifest)
    sizes = {shard.file: size for shard in manifest.shards if (size := store.size(shard.file)) is not None}
    present = [shard for shard in manifest.shards if shard.file in sizes]
    stop = threading.Event()
    opened = nullcontext() if source is None else open_files(source)
    with opened as sources, ThreadPoolExecutor(max_workers=max(1, jobs)) as pool:

        def check(part: _Part) -> list[Problem]:
            if stop.is_set():
                return []
            # Each tensor has its own descriptor: the kernel's read-ahead follows the last read of a descriptor.
            try:
                with open_files(store) as own:
                    output = OpenFile(own, part.shard.file)
                    found = list(_part_problems(description, part, output, sources, progress))
            except OSError as error:
                raise unreadable_tensor(
                    str(store.root / part.shard.file),
                    part.tensor and part.tensor.name,
                    error.strerror,
                    hint=hint_about_open_files(error),
                ) from error
            if found and fail_fast:
                stop.set()
            return found

        parts = [
            part
            for shard in present
            for part in _parts(shard, sizes[shard.file], skip)
            if only is None or (shard.file if part.tensor is None else part.tensor.name) in only
        ]
        problems = [problem for found in pool.map(check, parts) for problem in found]
    problems += _changed_files(store, manifest, only)
    compared = [tensor for shard in present for tensor in shard.tensors if only is None or tensor.name in only]
    headers = sum(shard.header for shard in present if only is None or shard.file in only)
    rest = sum(file.size for file in manifest.files if only is None or file.name in only)
    result = BytesResult(
        pieces=sum(len(tensor.pieces) for tensor in compared),
        nbytes=sum(tensor.nbytes for tensor in compared) + headers + rest,
        against_source=source is not None,
    )
    return result, problems


def _changed_files(store: Files, manifest: Manifest, only: Collection[str] | None) -> list[Problem]:
    """A problem for each file beside the shards that is not as it was written."""
    with open_files(store) as opened:
        return [
            Problem("bytes", None, file.name, "The file has changed since it was written")
            for file in manifest.files
            if only is None or file.name in only
            if (size := store.size(file.name)) is not None
            and _range_checksum(OpenFile(opened, file.name), 0, size) != file.checksum
        ]


def check_source(source: Files, manifest: Manifest) -> None:
    """Refuse a source whose files are not those that were converted.

    Raises:
        SourceError: a file is missing, or of another size.
    """
    for name, size in manifest.sources:
        found = source.size(name)
        if found != size:
            raise SourceError(
                "This is not the source that was converted",
                code="shard-missing",
                file=str(source.root / name),
                expected=f"{size} bytes",
                found="no file" if found is None else f"{found} bytes",
                hint="give --source the checkpoint that was converted, or leave it out",
            )


class _Part(NamedTuple):
    """The unit of work of a thread: a tensor and its position in a shard, or the shard's header."""

    shard: WrittenShard
    tensor: WrittenTensor | None
    position: int


def _parts(shard: WrittenShard, available: int, skip: Collection[str]) -> Iterator[_Part]:
    yield _Part(shard, None, 0)
    position = shard.header
    for tensor in shard.tensors:
        if position + tensor.nbytes > available:  # truncated, which check_structure reports
            return
        if tensor.name not in skip:
            yield _Part(shard, tensor, position)
        position += tensor.nbytes


def _part_problems(
    description: Description, part: _Part, output: OpenFile, sources: FileReads | None, progress: Callable[[int], None]
) -> Iterator[Problem]:
    shard, tensor, position = part
    if tensor is None:
        if _range_checksum(output, 0, shard.header) != shard.header_checksum:
            yield Problem("bytes", None, shard.file, "The header differs from the one that was written")
        progress(shard.header)
        return
    wrong: list[tuple[WrittenPiece, str]] = []
    for written in tensor.pieces:
        piece = written.piece
        if _range_checksum(output, position, piece.output_nbytes) != written.checksum:
            wrong.append((written, "differ from the checksum in the manifest"))
        elif sources is not None and not _same_as_source(output, position, sources, piece):
            wrong.append((written, "differ from the source"))
        position += piece.output_nbytes
        progress(piece.output_nbytes)
    if wrong:
        first, reason = wrong[0]
        yield wrong_pieces(description, tensor.name, first.piece.source.tensor, reason, len(wrong), len(tensor.pieces))


def _blocks(file: OpenFile, start: int, nbytes: int) -> Iterator[bytes]:
    """A byte range, a block at a time; shorter where the file ends."""
    end = start + nbytes
    while start < end:
        block = file.read(start, min(_BLOCK, end - start))
        if not block:
            return
        yield block
        start += len(block)


_memory = threading.local()


def _range_checksum(file: OpenFile, start: int, nbytes: int) -> str:
    """The checksum of a byte range, read into one buffer per thread: the kernel zeroes new memory first."""
    if not hasattr(_memory, "block"):
        _memory.block = memoryview(bytearray(BLOCK))
    hasher, end = xxhash.xxh3_128(), start + nbytes
    while start < end:
        count = file.read_into(_memory.block[: min(BLOCK, end - start)], start)
        if count == 0:  # the file ends early: the checksum differs
            break
        hasher.update(_memory.block[:count])
        start += count
    return hasher.hexdigest()


def _same_as_source(output: OpenFile, position: int, sources: FileReads, piece: Piece) -> bool:
    """Whether a piece of the output equals the bytes computed from its source range."""
    for expected in _expected(sources, piece):
        if b"".join(_blocks(output, position, len(expected))) != expected:
            return False
        position += len(expected)
    return True


def _expected(sources: FileReads, piece: Piece) -> Iterator[bytes]:
    """The expected bytes of a piece, block by block, computed independently of the writer."""
    match piece:
        case Copy(_, file, start, nbytes):
            yield from _blocks(OpenFile(sources, file), start, nbytes)
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


def _expected_rows(sources: FileReads, scale: Scale) -> torch.Tensor:
    """A scale as F32, repeated: by torch, where the writer computes it from bits."""
    _, file, start, nbytes = scale.source
    data = bytearray().join(_blocks(OpenFile(sources, file), start, nbytes))
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
        codes = torch.frombuffer(bytearray().join(_blocks(OpenFile(sources, file), start, nbytes)), dtype=torch.int8)
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
        data = bytearray().join(_blocks(file, first, nbytes))
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
        data = bytearray().join(_blocks(file, source.start + first * stride, (rows - 1) * stride + run))
        view = torch.frombuffer(data, dtype=torch.uint8).as_strided((rows, run), (stride, 1))
        yield _bytes_of(view)


def _bytes_of(tensor: torch.Tensor) -> bytes:
    result = bytearray(tensor.nbytes)
    if result:
        torch.frombuffer(result, dtype=torch.uint8).copy_(tensor.contiguous().view(torch.uint8).flatten())
    return bytes(result)
