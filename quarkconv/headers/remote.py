"""Headers of files that may be elsewhere than on disk: a few requests for all of them together."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.headers.safetensors import (
    MAX_HEADER_BYTES,
    ShardHeader,
    check_length,
    parse_header,
    read_header,
    too_short,
)
from quarkconv.progress import SILENT, Progress

READING_HEADERS: Final = "Reading headers"
FIRST_GUESS: Final = 128 * 2**10
"""Bytes of a remote file that are fetched before the length of its header is known; most headers are shorter."""


def read_header_of(files: Files, file: str) -> ShardHeader:
    """Read and check the header of a file, wherever it is; the tensor data is not touched.

    Raises:
        SourceError: as :func:`read_header`, and the file could not be had.
    """
    path = files.path(file)
    if path is not None:
        return read_header(path, file)
    size = files.size(file)
    if size is None:
        raise SourceError("The file cannot be read", code="shard-missing", file=file, found="no such file in the repo")
    prefix = files.read(file, 0, 8)
    if len(prefix) < 8:
        raise too_short(file, size)
    (length,) = struct.unpack("<Q", prefix)
    check_length(file, length, size)
    return parse_header(files.read(file, 8, length), file, size)


def expect_headers(files: Files, names: Iterable[str], progress: Progress = SILENT) -> None:
    """Announce that the headers of some files are going to be read: what is remote is then fetched all at once.

    Args:
        files: the files.
        names: those whose headers will be read.
        progress: one step, a unit of work for each remote header.
    """
    remote = [name for name in names if files.path(name) is None and files.size(name) is not None]
    ends: dict[str, int] = {}

    def guessed(name: str) -> None:
        prefix = files.read(name, 0, 8)
        end = 8 + struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if FIRST_GUESS < end <= 8 + MAX_HEADER_BYTES:  # a length beyond that is an error of the one who reads it
            ends[name] = end
        else:
            progress.advance()

    if remote:
        progress.step(READING_HEADERS, len(remote), "shard")
    files.expect(dict.fromkeys(remote, FIRST_GUESS), guessed)
    files.expect(ends, lambda _: progress.advance())
