"""Safetensors headers: bytes -> checked entries.

The format (https://huggingface.co/docs/safetensors, ``safetensors/src/tensor.rs``): 8 bytes little-endian header
length N, N bytes of JSON that map a tensor's name to ``{"dtype", "shape", "data_offsets"}``, then the data. Offsets
count from the end of the header; together they cover the data without overlap or hole. This parser refuses whatever
the format's own parser refuses. It also refuses duplicate names, NaN, names of more than 1,024 characters, more than 64
dimensions, and more than 500,000 tensors: no tool writes these, and reading them would cost unbounded memory.

A large checkpoint has 100,000 entries. :mod:`quarkconv.headers.scan` checks those of a header as tools write it at C
speed; any other header takes the JSON parser and the checks of this module, which name the first entry that is invalid.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Collection, Iterable, Iterator, KeysView, Sequence
from itertools import chain
from operator import itemgetter
from typing import Final, NamedTuple, NoReturn, TypeVar

from quarkconv.defects import invalid_header, short_file, unreadable_file
from quarkconv.dtypes import DTYPE_BITS, MAX_DIMENSIONS, TensorType, is_tensor_type, overflows
from quarkconv.errors import SourceError
from quarkconv.files.regular import open_regular
from quarkconv.files.strict_json import load_header_json
from quarkconv.headers.collector import collector_paused
from quarkconv.headers.quantizer_names import MARK, is_renamed, usual_names
from quarkconv.headers.scan import scan_header
from quarkconv.text import shortened, shown

MAX_HEADER_BYTES: Final = 100_000_000
"""The bound that safetensors itself sets on a header."""

MAX_TENSORS: Final = 500_000
"""Most tensors of a checkpoint. The largest models, 1T parameters with scales and zero points, have half as many."""
MAX_NAME: Final = 1024
_MIN_ENTRY_BYTES: Final = 48
_MAX_FREE_BYTES: Final = 32 * 2**20
_MAX_FREE_TENSORS: Final = 100_000
_MAX_FREE_VALUES: Final = 2_000_000
"""Limits of a header that needs the JSON parser, which takes several times the memory."""

_ODD: Final = ("\\", "/", "\x7f")
"""In a header of ASCII, a name is odd only if one of these occurs."""

_T = TypeVar("_T")


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
        raise unreadable_file(file, getattr(error, "strerror", None) or str(error)) from error
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
            tensors, starts, ends = _parse(text, file)
        else:
            tensors, ends = scanned
            starts = (0, *ends[:-1])
        if max(map(len, tensors), default=0) > MAX_NAME:
            _refuse(file, max(tensors, key=len), f"a name of at most {MAX_NAME} characters", "a longer one")
        data_size = _check_data(file, tensors, starts, ends) if scanned is None else ends[-1]
        renamed = False
        if MARK in text:
            names = usual_names(tensors)
            renamed = is_renamed(tensors, names)
            tensors = dict(zip(names, tensors.values(), strict=True))
        plain = text.isascii() and not any(char in text for char in _ODD)
        odd = () if plain else tuple(name for name in tensors if not name.isprintable() or "/" in name or "\\" in name)
    if data_start + data_size < size:
        raise invalid_header(
            file,
            message="The file has bytes after the data of its last tensor",
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


def _parse(text: str, file: str) -> tuple[dict[str, TensorType], Sequence[int], Sequence[int]]:
    """Tensors, starts and ends of a header in any form of JSON."""
    tensors, values = text.count("{"), text.count(",")
    if tensors > _MAX_FREE_TENSORS + 2 or values > _MAX_FREE_VALUES or len(text) > _MAX_FREE_BYTES:
        raise _over_limit(
            file,
            f"at most {_MAX_FREE_TENSORS} tensors, {_MAX_FREE_VALUES} values and {_MAX_FREE_BYTES} characters in JSON "
            "that is not as safetensors writes it",
            f"{tensors} opening braces, {values} commas and {len(text)} characters",
        )
    try:
        entries = load_header_json(text)
    except (ValueError, RecursionError) as error:
        raise _not_json(error, file) from error
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        _refuse(file, "__metadata__", "an object of strings", shown(metadata))
    types, starts, ends = _columns(entries, file)
    return dict(zip(entries, types, strict=True)), starts, ends


def _check_costs(raw: bytes, file: str) -> None:
    """Refuse a header that would take too much memory, before parsing it."""
    if len(raw) < MAX_TENSORS * _MIN_ENTRY_BYTES:
        return
    tensors = raw.count(b"{")  # one for each, one around them, one of the metadata, and whatever names hold
    if tensors > MAX_TENSORS + 2:
        raise _over_limit(file, f"at most {MAX_TENSORS} tensors", f"{tensors} opening braces")
    if len(raw) > _MAX_FREE_BYTES and not raw.isascii():
        raise _over_limit(file, f"ASCII in a header of more than {_MAX_FREE_BYTES} bytes", f"{len(raw)} bytes")


def _over_limit(file: str, expected: str, found: str) -> SourceError:
    return invalid_header(
        file,
        message="The header exceeds a limit",
        expected=expected,
        found=found,
        hint="split the file, or write it with the safetensors library",
    )


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
        raise _not_json(error, file) from error


def _not_json(error: Exception, file: str) -> SourceError:
    return invalid_header(file, message="The header is not valid JSON", found=str(error) or "nesting too deep")


def _columns(
    entries: dict[str, dict[str, object]], file: str
) -> tuple[Sequence[TensorType], Sequence[int], Sequence[int]]:
    """Split the entries into types, starts and ends, every field present and of the right JSON type."""
    if not entries:
        return (), (), ()
    values = entries.values()
    try:
        if set(map(type, values)) != {dict} or set(map(len, values)) != {3}:
            raise ValueError
        dtypes, shapes, offsets = zip(*map(itemgetter("dtype", "shape", "data_offsets"), values), strict=True)
        if set(map(type, shapes)) != {list} or set(map(type, offsets)) != {list}:
            raise ValueError
        starts, ends = zip(*offsets, strict=True)
        if set(map(type, chain(starts, ends, chain.from_iterable(shapes)))) != {int} or min(starts) < 0:
            raise ValueError
        types = [TensorType(dtype, tuple(shape)) for dtype, shape in zip(dtypes, shapes, strict=True)]
        if not all(map(is_tensor_type, distinct(types))):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        _find_bad_entry(entries, file)
    return types, starts, ends


def distinct(items: Iterable[_T]) -> Collection[_T]:
    """The distinct objects among many that are mostly shared. Compares identities, so nothing is hashed."""
    return {id(item): item for item in items}.values()


def _find_bad_entry(entries: dict[str, dict[str, object]], file: str) -> NoReturn:
    """Name the first entry that made :func:`_columns` fail."""

    def sizes(value: object) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            _refuse(file, name, "an object of dtype, shape and data_offsets", shown(entry))
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            _refuse(file, name, "a dtype of the safetensors format", shown(dtype))
        if not isinstance(shape, list) or not sizes(shape):
            _refuse(file, name, "a shape of whole numbers that are not negative", shown(shape))
        if len(shape) > MAX_DIMENSIONS:
            _refuse(file, name, f"at most {MAX_DIMENSIONS} dimensions", str(len(shape)))
        if overflows(TensorType(dtype, tuple(shape))):
            _refuse(file, name, "a size that fits in 64 bits", shown(shape))
        if not sizes(offsets) or not isinstance(offsets, list) or len(offsets) != 2:
            _refuse(file, name, "two data_offsets that are not negative", shown(offsets))
    raise AssertionError("no bad entry in a header that failed its checks")  # pragma: no cover


def _check_data(file: str, tensors: dict[str, TensorType], starts: Sequence[int], ends: Sequence[int]) -> int:
    """Check the byte ranges, see below; returns the size of the data."""
    _check_sizes(file, tensors, starts, ends)
    _check_coverage(file, tensors, starts, ends)
    return max(ends, default=0)


def _check_sizes(file: str, tensors: dict[str, TensorType], starts: Sequence[int], ends: Sequence[int]) -> None:
    """Every byte range is as long as dtype and shape say."""
    for (name, found), start, end in zip(tensors.items(), starts, ends, strict=True):
        if found.bits != 8 * (end - start):
            expected = f"{found.bits / 8:g} bytes for {found.dtype} {list(found.shape)}"
            _refuse(file, name, expected, f"data_offsets that span {end - start} bytes")


def _check_coverage(file: str, names: Iterable[str], starts: Sequence[int], ends: Sequence[int]) -> None:
    """The ranges cover the data from 0 without overlap or hole."""
    position = 0
    for start, end, name in sorted(zip(starts, ends, names, strict=True)):
        if start != position:
            kind = "leaves a hole before" if start > position else "overlaps the tensor before"
            _refuse(file, name, f"data that starts at {position}", f"data that starts at {start} and {kind} it")
        position = end


def _refuse(file: str, tensor: str, expected: str, found: str) -> NoReturn:
    raise invalid_header(file, tensor=shortened(tensor), expected=expected, found=found)
