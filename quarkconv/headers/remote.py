"""Headers of local and remote files. Those of remote files are fetched together, in a few requests."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from quarkconv.defects import unreadable_file
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
"""Bytes of a remote file to fetch before the length of its header is known. Most headers are shorter."""


def read_header_of(files: Files, file: str) -> ShardHeader:
    """Read and check the header of a local or remote file; the tensor data is not touched.

    Raises:
        SourceError: as :func:`read_header`; or the file does not exist in the repo.
    """
    path = files.path(file)
    if path is not None:
        return read_header(path, file)
    size = files.size(file)
    if size is None:
        raise unreadable_file(file, "no such file in the repo")
    prefix = files.read(file, 0, 8)
    if len(prefix) < 8:
        raise too_short(file, size)
    (length,) = struct.unpack("<Q", prefix)
    check_length(file, length, size)
    return parse_header(files.read(file, 8, length), file, size)


def expect_headers(files: Files, names: Iterable[str], progress: Progress = SILENT) -> None:
    """Announce which headers will be read, so that those of remote files are fetched together.

    Args:
        files: the files.
        names: the files whose headers will be read.
        progress: one step, a unit of work for each remote header.
    """
    remote = [name for name in names if files.path(name) is None and files.size(name) is not None]
    ends: dict[str, int] = {}

    def guessed(name: str) -> None:
        prefix = files.read(name, 0, 8)
        end = 8 + struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else 0
        if FIRST_GUESS < end <= 8 + MAX_HEADER_BYTES:  # reading a longer one reports the error
            ends[name] = end
        else:
            progress.advance()

    if remote:
        progress.step(READING_HEADERS, len(remote), "shard")
    files.expect(dict.fromkeys(remote, FIRST_GUESS), guessed)
    files.expect(ends, lambda _: progress.advance())
