"""Safetensors headers: bytes -> checked entries.

The format (https://huggingface.co/docs/safetensors, ``safetensors/src/tensor.rs``): 8 bytes little-endian header
length N, N bytes of JSON that map a tensor's name to ``{"dtype", "shape", "data_offsets"}``, then the data. Offsets
count from the end of the header; together they cover the data without overlap or hole. This parser refuses whatever
the format's own parser refuses. It also refuses duplicate names, NaN, names of more than 1,024 characters, more than 64
dimensions, and more than 500,000 tensors: no tool writes these, and reading them would cost unbounded memory.

A large checkpoint has 100,000 entries. :mod:`quarkconv.headers.scan` checks those of a header as tools write it at C
speed; any other header takes the JSON parser and the checks of :mod:`quarkconv.headers.entries`, which name the first
entry that is invalid.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterator, KeysView, Sequence
from typing import Final, NamedTuple

from quarkconv.defects import invalid_header, missing_file, short_file, unreadable_file
from quarkconv.dtypes import TensorType
from quarkconv.errors import COPY_AGAIN, SourceError
from quarkconv.files.regular import CHECK_ACCESS, FETCH_POINTER, LFS_POINTER, open_regular
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.entries import MAX_FREE_BYTES, check_data, not_json, over_limit, parse_entries, refuse_entry
from quarkconv.headers.quantizer_names import is_renamed, may_be_renamed, usual_names
from quarkconv.headers.scan import scan_header

MAX_HEADER_BYTES: Final = 100_000_000
"""The bound that safetensors itself sets on a header."""

MAX_TENSORS: Final = 500_000
"""Most tensors of a checkpoint. The largest models, 1T parameters with scales and zero points, have half as many."""
MAX_NAME: Final = 1024
_MIN_ENTRY_BYTES: Final = 48
_LFS_POINTER: Final = int.from_bytes(LFS_POINTER[:8], "little")
"""The length of the header, were it one, of a file that Git LFS has not fetched."""
_TEXT: Final = re.compile(rb"[\t\n\r -~]{8}")
"""The same of a text, such as the page of a server that refuses a download."""
_ODD: Final = ("\\", "/", "\x7f")
"""In a header of ASCII, a name is odd only if one of these occurs."""


class TensorRef(NamedTuple):
    """Where a tensor lies: a byte range of a file.

    Attributes:
        dtype: the format's name, such as ``I8``.
        shape: sizes, outermost first; ``()`` for a scalar.
        file: name of the file inside the checkpoint.
        start: first byte, counted from the beginning of the file.
        end: one past the last byte.
    """

    dtype: str
    shape: tuple[int, ...]
    file: str
    start: int
    end: int

    @property
    def nbytes(self) -> int:
        """Size in bytes."""
        return self.end - self.start


class ShardHeader(NamedTuple):
    """The checked header of one file.

    Attributes:
        file: name of the file inside the checkpoint.
        size: size of the whole file in bytes.
        data_start: where the data starts; ``starts`` and ``ends`` count from there.
        tensors: name -> dtype and shape. Row i of ``starts`` and ``ends`` belongs to the i-th of them.
        nbytes: size of all tensors in bytes.
        truncated: bytes that the header promises beyond the end of the file; 0 for a complete file.
        odd_names: the names that are not printable, or that contain a slash or backslash.
        renamed: True where the names are not those of the file: see :mod:`quarkconv.headers.quantizer_names`.
    """

    file: str
    size: int
    data_start: int
    tensors: dict[str, TensorType]
    starts: Sequence[int]
    ends: Sequence[int]
    nbytes: int
    truncated: int = 0
    odd_names: tuple[str, ...] = ()
    renamed: bool = False

    @property
    def names(self) -> KeysView[str]:
        """The names of the tensors."""
        return self.tensors.keys()

    def refs(self) -> Iterator[tuple[str, TensorRef]]:
        """The tensors with their byte ranges in the file."""
        base = self.data_start
        for name, (dtype, shape), start, end in zip(
            self.tensors, self.tensors.values(), self.starts, self.ends, strict=True
        ):
            yield name, TensorRef(dtype, shape, self.file, base + start, base + end)


def read_header(path: str | os.PathLike[str], file: str) -> ShardHeader:
    """Read and check the header of one file; the tensor data is not touched.

    Args:
        path: where the file is.
        file: its name inside the checkpoint, for the entries and for messages.

    Raises:
        SourceError: the file cannot be read or breaks a rule of the format. A file that only ends before its data does
            not raise: ``truncated`` of the result says how many bytes are missing.
    """
    try:
        with open(open_regular(path), "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            prefix = handle.read(8)
            if len(prefix) < 8:
                raise too_short(file, size)
            (length,) = struct.unpack("<Q", prefix)
            check_length(file, length, size)
            raw = handle.read(length)
    except (OSError, ValueError) as error:  # ValueError: a null character in the name
        if isinstance(error, FileNotFoundError):
            raise missing_file(file, "shard-missing") from error
        hint = CHECK_ACCESS if isinstance(error, PermissionError) else COPY_AGAIN
        raise unreadable_file(file, getattr(error, "strerror", None) or str(error), hint=hint) from error
    return parse_header(raw, file, size)


def parse_header(raw: bytes, file: str, size: int) -> ShardHeader:
    """Check the JSON part of a header.

    Args:
        raw: the header's bytes, without the 8 bytes of length.
        file: name of the file, for entries and messages.
        size: size of the whole file in bytes.

    Raises:
        SourceError: a rule of the format is broken.
    """
    data_start = 8 + len(raw)
    with collector_paused():
        _check_costs(raw, file)
        text = _decode(raw, file)
        scanned = scan_header(text)
        if scanned is None:
            tensors, starts, ends = parse_entries(text, file)
        else:
            tensors, ends = scanned
            starts = (0, *ends[:-1])
        if max(map(len, tensors), default=0) > MAX_NAME:
            refuse_entry(file, max(tensors, key=len), f"a name of at most {MAX_NAME} characters", "a longer one")
        data_size = check_data(file, tensors, starts, ends) if scanned is None else ends[-1]
        renamed = False
        if may_be_renamed(text, tensors):
            names = usual_names(tensors)
            renamed = is_renamed(tensors, names)
            tensors = dict(zip(names, tensors.values(), strict=True))
        plain = text.isascii() and not any(char in text for char in _ODD)
        odd = () if plain else tuple(name for name in tensors if not name.isprintable() or "/" in name or "\\" in name)
    if data_start + data_size < size:
        raise invalid_header(
            file,
            message="The file has bytes after its last tensor",
            expected=f"{data_start + data_size} bytes",
            found=f"{size} bytes",
        )
    return ShardHeader(
        file=file,
        size=size,
        data_start=data_start,
        tensors=tensors,
        starts=starts,
        ends=ends,
        nbytes=data_size,
        truncated=data_start + data_size - size,
        odd_names=odd,
        renamed=renamed,
    )


def _check_costs(raw: bytes, file: str) -> None:
    """Refuse a header that would take too much memory, before parsing it."""
    if len(raw) < MAX_TENSORS * _MIN_ENTRY_BYTES:
        return
    tensors = raw.count(b"{")  # one for each, one around them, one of the metadata, and whatever names hold
    if tensors > MAX_TENSORS + 2:
        raise over_limit(file, f"at most {MAX_TENSORS} tensors", f"{tensors} opening braces")
    if len(raw) > MAX_FREE_BYTES and not raw.isascii():
        raise over_limit(file, f"ASCII in a header of more than {MAX_FREE_BYTES} bytes", f"{len(raw)} bytes")


def too_short(file: str, size: int) -> SourceError:
    """The error for a file that ends before the length of its header."""
    return short_file(
        "The file is too short to be a safetensors file", file, expected="at least 8 bytes", found=f"{size} bytes"
    )


def check_length(file: str, length: int, size: int) -> None:
    """Refuse a header that is longer than the format allows, or than its file.

    Raises:
        SourceError: it is too long.
    """
    if length == _LFS_POINTER:
        raise invalid_header(
            file,
            message="The file is a Git LFS pointer, without the weights",
            expected="a safetensors file",
            found=f"a text of {size} bytes",
            hint=FETCH_POINTER,
        )
    if _TEXT.fullmatch(start := length.to_bytes(8, "little")):
        raise invalid_header(
            file,
            message="The file is text, not weights",
            expected="a safetensors file",
            found=f"a text of {size} bytes that starts with {start.decode()!r}",
            hint="read the file: it may explain why the download failed",
        )
    if length > MAX_HEADER_BYTES:
        raise invalid_header(
            file,
            message="The header is longer than the format allows",
            expected=f"at most {MAX_HEADER_BYTES} bytes",
            found=f"{length} bytes",
            hint="the file is not a safetensors file, or is damaged",
        )
    if 8 + length > size:
        raise short_file(
            "The file ends inside its header",
            file,
            expected=f"a header of {length} bytes",
            found=f"a file of {size} bytes",
        )


def _decode(raw: bytes, file: str) -> str:
    try:
        return raw.decode("utf-8")
    except ValueError as error:
        raise not_json(error, file) from error
