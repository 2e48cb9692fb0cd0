"""Safetensors headers: bytes -> checked entries.

The format (https://huggingface.co/docs/safetensors, ``safetensors/src/tensor.rs``): 8 bytes little-endian header
length N, N bytes of JSON that map a tensor's name to ``{"dtype", "shape", "data_offsets"}``, then the data. Offsets
count from the end of the header; together they cover the data without overlap and without hole. This parser refuses
whatever the format's own parser refuses, and also duplicate names and NaN.

A large checkpoint has 100,000 entries, so the checks below run over whole columns with C-level iteration instead of
entry by entry; only when a column fails is the first bad entry looked for, to name it.
"""

from __future__ import annotations

import gc
import json
import os
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from math import prod
from operator import eq, itemgetter, sub
from typing import Final, NamedTuple, NoReturn

from quarkconv.errors import SourceError

MAX_HEADER_BYTES: Final = 100_000_000
"""The bound that safetensors itself sets on a header."""

DTYPE_BITS: Final[dict[str, int]] = {
    "BOOL": 8, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "U8": 8, "I8": 8, "F8_E5M2": 8, "F8_E4M3": 8, "F8_E8M0": 8,
    "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "C64": 64, "F64": 64, "I64": 64, "U64": 64,
}  # fmt: skip
"""Bits per element of every dtype of the format."""

FLOAT_DTYPES: Final = frozenset({"BF16", "F16", "F32", "F64"})
"""Dtypes in which unquantized weights are stored."""


Kind = tuple[str, tuple[int, ...]]
"""Dtype and shape of a tensor, outermost dimension first; the shape of a scalar is ``()``."""


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


@dataclass(frozen=True, slots=True)
class ShardHeader:
    """The checked header of one file, as columns: row i describes the tensor ``names[i]``.

    Attributes:
        file: name of the file inside the checkpoint.
        size: size of the whole file in bytes.
        data_start: where the data starts; ``starts`` and ``ends`` count from there.
        truncated: how many bytes the header promises beyond the end of the file; 0 for a sound file.
    """

    file: str
    size: int
    data_start: int
    names: Sequence[str]
    kinds: Sequence[Kind]
    starts: Sequence[int]
    ends: Sequence[int]
    truncated: int = 0

    def refs(self) -> Iterator[tuple[str, TensorRef]]:
        """The tensors with their byte ranges in the file."""
        base = self.data_start
        for name, (dtype, shape), start, end in zip(self.names, self.kinds, self.starts, self.ends, strict=True):
            yield name, TensorRef(dtype, shape, self.file, base + start, base + end)


def read_header(path: str | os.PathLike[str], file: str) -> ShardHeader:
    """Read and check the header of one file; the tensor data is not touched.

    Args:
        path: where the file is.
        file: its name inside the checkpoint, for the entries and for messages.

    Raises:
        SourceError: the file cannot be read or breaks a rule of the format. A file that is only too short for its
            data does not raise: ``truncated`` of the result says by how much.
    """
    try:
        with open(path, "rb") as handle:
            size = os.fstat(handle.fileno()).st_size
            prefix = handle.read(8)
            if len(prefix) < 8:
                raise SourceError(
                    "The file is too short to be a safetensors file",
                    code="shard-truncated", file=file, expected="at least 8 bytes", found=f"{size} bytes",
                    hint="download or copy the file again",
                )  # fmt: skip
            (length,) = struct.unpack("<Q", prefix)
            _check_length(file, length, size)
            raw = handle.read(length)
    except OSError as error:
        raise SourceError(
            "The file cannot be read", code="shard-missing", file=file, found=error.strerror or str(error)
        ) from error
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
        entries = _load(raw, file)
        metadata = entries.pop("__metadata__", None)
        if metadata is not None and not (
            isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
        ):
            _refuse(file, "__metadata__", "an object of strings", _show(metadata))
        names = list(entries)
        kinds, starts, ends = _columns(entries, file)
        _check_sizes(file, names, kinds, starts, ends)
        data_size = _check_coverage(file, names, starts, ends)
    if data_start + data_size < size:
        raise SourceError(
            "The file has bytes after the data of its last tensor",
            file=file, expected=f"{data_start + data_size} bytes", found=f"{size} bytes",
            hint="download or copy the file again",
        )  # fmt: skip
    return ShardHeader(file, size, data_start, names, kinds, starts, ends, data_start + data_size - size)


def _check_length(file: str, length: int, size: int) -> None:
    if length > MAX_HEADER_BYTES:
        raise SourceError(
            "The header is longer than the format allows",
            file=file, expected=f"at most {MAX_HEADER_BYTES} bytes", found=f"{length} bytes",
            hint="the file is not a safetensors file, or is damaged",
        )  # fmt: skip
    if 8 + length > size:
        raise SourceError(
            "The file ends inside its header",
            code="shard-truncated", file=file, expected=f"a header of {length} bytes", found=f"a file of {size} bytes",
            hint="download or copy the file again",
        )  # fmt: skip


def _load(raw: bytes, file: str) -> dict[str, dict[str, object]]:
    try:
        text = raw.decode("utf-8")
        if not text.startswith("{"):
            raise ValueError("the header does not start with '{'")
        entries = json.loads(text, parse_constant=_no_constant)
        # A duplicate name is lost by the dict. Counting a key that every entry has shows it without slowing the parse;
        # a name may contain that text, so the count only decides whether to look closer.
        if text.count('"data_offsets"') != len(entries) - ("__metadata__" in entries):
            json.loads(text, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise SourceError(
            "The header is not valid JSON", file=file, found=str(error) or "nesting too deep",
            hint="download or copy the file again",
        ) from error  # fmt: skip
    if not isinstance(entries, dict):  # pragma: no cover - a text that starts with '{' parses to an object
        _refuse(file, "header", "an object", _show(entries))
    return entries


def _columns(
    entries: dict[str, dict[str, object]], file: str
) -> tuple[Sequence[Kind], Sequence[int], Sequence[int]]:
    """Split the entries into kinds, starts and ends, every field present and of the right JSON type."""
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
        kinds = list(zip(dtypes, map(tuple, shapes), strict=True))
        for dtype, shape in set(kinds):
            if dtype not in DTYPE_BITS or min(shape, default=0) < 0:
                raise ValueError
    except (ValueError, KeyError, TypeError):
        _find_bad_entry(entries, file)
    return kinds, starts, ends


def _find_bad_entry(entries: dict[str, dict[str, object]], file: str) -> NoReturn:
    """Name the first entry that made :func:`_columns` fail."""

    def sizes(value: object) -> bool:
        return isinstance(value, list) and all(type(item) is int and item >= 0 for item in value)

    for name, entry in entries.items():
        if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
            _refuse(file, name, "an object of dtype, shape and data_offsets", _show(entry))
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            _refuse(file, name, "a dtype of the safetensors format", _show(dtype))
        if not sizes(shape):
            _refuse(file, name, "a shape of whole numbers that are not negative", _show(shape))
        if not sizes(offsets) or not isinstance(offsets, list) or len(offsets) != 2:
            _refuse(file, name, "two data_offsets that are not negative", _show(offsets))
    raise AssertionError("no bad entry in a header that failed its checks")  # pragma: no cover


def _check_sizes(
    file: str, names: Sequence[str], kinds: Sequence[Kind], starts: Sequence[int], ends: Sequence[int]
) -> None:
    """Every byte range is as long as dtype and shape say."""
    bits = {kind: DTYPE_BITS[kind[0]] * prod(kind[1]) for kind in set(kinds)}
    nbytes = {kind: count // 8 if count % 8 == 0 else -1 for kind, count in bits.items()}
    if all(map(eq, map(nbytes.__getitem__, kinds), map(sub, ends, starts))):
        return
    for name, kind, start, end in zip(names, kinds, starts, ends, strict=True):
        if nbytes[kind] != end - start:
            expected = f"{bits[kind] / 8:g} bytes for {kind[0]} {list(kind[1])}"
            _refuse(file, name, expected, f"data_offsets that span {end - start} bytes")


def _check_coverage(file: str, names: Sequence[str], starts: Sequence[int], ends: Sequence[int]) -> int:
    """The ranges cover the data from 0 without overlap or hole; returns the size of the data."""
    if not starts:
        return 0
    if starts[0] != 0 or starts[1:] != ends[:-1]:
        position = 0
        for start, end, name in sorted(zip(starts, ends, names, strict=True)):
            if start != position:
                kind = "leaves a hole before" if start > position else "overlaps the tensor before"
                _refuse(file, name, f"data that starts at {position}", f"data that starts at {start} and {kind} it")
            position = end
    return max(ends)


@contextmanager
def collector_paused() -> Iterator[None]:
    """Pause the cyclic garbage collector: parsing makes 100,000 small containers, none of them garbage."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _no_duplicates(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"the name {_show(twice)} occurs twice")
    return found


def _refuse(file: str, tensor: str, expected: str, found: str) -> NoReturn:
    raise SourceError(
        "The safetensors header is not valid", file=file, tensor=tensor, expected=expected, found=found,
        hint="download or copy the file again",
    )  # fmt: skip


def _show(value: object) -> str:
    """A short, escaped rendering of a value from the file."""
    text = json.dumps(value)
    return text if len(text) <= 80 else text[:77] + "..."
