"""Headers of files that may be elsewhere than on disk: a few requests for all of them together."""

from __future__ import annotations

import struct
from collections.abc import Iterable
from typing import Final

from quarkconv.errors import SourceError
from quarkconv.files.files import Files
from quarkconv.headers.safetensors import (
    MAX_HEADER_BYTES,
    ShardHeader,
    check_length,
    parse_header,
    read_header,
    too_short,
)

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


def expect_headers(files: Files, names: Iterable[str]) -> None:
    """Announce that the headers of some files are going to be read: what is remote is then fetched all at once."""
    remote = [name for name in names if files.path(name) is None and files.size(name) is not None]
    files.expect(dict.fromkeys(remote, FIRST_GUESS))
    lengths = {name: files.read(name, 0, 8) for name in remote}
    known = {name: struct.unpack("<Q", prefix)[0] for name, prefix in lengths.items() if len(prefix) == 8}
    files.expect({name: 8 + length for name, length in known.items() if length <= MAX_HEADER_BYTES})
