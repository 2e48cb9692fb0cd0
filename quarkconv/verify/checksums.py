"""Bytes: every piece of the output compared with the manifest's checksum, and with the source.

Ranges of the output follow from manifest and headers, and checksums are computed again. The code that wrote the output
shares nothing with this.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import NamedTuple

import xxhash

from quarkconv.defects import unreadable_file, unreadable_tensor
from quarkconv.description.description import Description
from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.files.open_limit import hint_about_open_files
from quarkconv.load.open_files import BLOCK, FileReads, OpenFile, open_files
from quarkconv.plan.manifest import Manifest, WrittenPiece, WrittenShard, WrittenTensor
from quarkconv.plan.pieces import Piece
from quarkconv.verify.expected import expected_bytes, read_blocks
from quarkconv.verify.places import wrong_pieces
from quarkconv.verify.results import BytesResult, Problem


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
            found = _checked(description, part, sources, progress)
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
    """A problem for each file beside the shards that is not as it was written.

    Raises:
        SourceError: one cannot be read.
    """
    chosen = [file for file in manifest.files if only is None or file.name in only]
    try:
        with open_files(store) as opened:
            return [
                Problem("bytes", None, file.name, "The file has changed since the conversion")
                for file in chosen
                if (size := store.size(file.name)) is not None
                and _range_checksum(OpenFile(opened, file.name), 0, size) != file.checksum
            ]
    except OSError as error:
        raise unreadable_file(os.fsdecode(error.filename or store.root), error.strerror) from error


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


def _checked(
    description: Description, part: _Part, sources: FileReads | None, progress: Callable[[int], None]
) -> list[Problem]:
    """The problems of a part.

    Raises:
        SourceError: a file of the output or of the source cannot be read.
    """
    store = description.checkpoint.store
    try:
        # Each tensor has its own descriptor: the kernel's read-ahead follows the last read of a descriptor.
        with open_files(store) as own:
            return list(_part_problems(description, part, OpenFile(own, part.shard.file), sources, progress))
    except OSError as error:
        raise unreadable_tensor(
            os.fsdecode(error.filename or store.root / part.shard.file),
            part.tensor and part.tensor.name,
            error.strerror,
            hint=hint_about_open_files(error),
        ) from error


def _part_problems(
    description: Description, part: _Part, output: OpenFile, sources: FileReads | None, progress: Callable[[int], None]
) -> Iterator[Problem]:
    shard, tensor, position = part
    if tensor is None:
        if _range_checksum(output, 0, shard.header) != shard.header_checksum:
            yield Problem("bytes", None, shard.file, "The header has changed since the conversion")
        progress(shard.header)
        return
    wrong: list[tuple[WrittenPiece, str]] = []
    for written in tensor.pieces:
        piece = written.piece
        if _range_checksum(output, position, piece.output_nbytes) != written.checksum:
            wrong.append((written, "do not match the checksum in the manifest"))
        elif sources is not None and not _same_as_source(output, position, sources, piece):
            wrong.append((written, "differ from the source"))
        position += piece.output_nbytes
        progress(piece.output_nbytes)
    if wrong:
        first, reason = wrong[0]
        yield wrong_pieces(description, tensor.name, first.piece.source.tensor, reason, len(wrong), len(tensor.pieces))


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
    for expected in expected_bytes(sources, piece):
        if b"".join(read_blocks(output, position, len(expected))) != expected:
            return False
        position += len(expected)
    return True
