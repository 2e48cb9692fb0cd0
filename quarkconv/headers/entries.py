"""The entries of a header in any form of JSON, parsed and checked; errors name the first entry that is invalid."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Sequence
from itertools import chain
from operator import itemgetter
from typing import Final, NoReturn, TypeVar

from quarkconv.defects import invalid_header
from quarkconv.dtypes import DTYPE_BITS, MAX_DIMENSIONS, TensorType, is_tensor_type, overflows
from quarkconv.errors import COPY_AGAIN, SourceError
from quarkconv.files.strict_json import load_header_json
from quarkconv.text import shortened, shown

MAX_FREE_BYTES: Final = 32 * 2**20
_MAX_FREE_TENSORS: Final = 100_000
_MAX_FREE_VALUES: Final = 2_000_000
"""Limits of a header that needs the JSON parser, which takes several times the memory."""

_DTYPE: Final = re.compile(r"[A-Z]{1,4}\d{1,3}(?:_\w{1,12})?")
_NEWER: Final = "this version of quarkconv does not read this dtype; a newer version of the format may have it"

_T = TypeVar("_T")


def parse_entries(text: str, file: str) -> tuple[dict[str, TensorType], Sequence[int], Sequence[int]]:
    """Tensors, starts and ends of a header in any form of JSON. Byte ranges are not checked.

    Raises:
        SourceError: the header is over a limit, is not JSON, or an entry is invalid.
    """
    tensors, values = text.count("{"), text.count(",")
    if tensors > _MAX_FREE_TENSORS + 2 or values > _MAX_FREE_VALUES or len(text) > MAX_FREE_BYTES:
        raise over_limit(
            file,
            f"at most {_MAX_FREE_TENSORS} tensors, {_MAX_FREE_VALUES} values and {MAX_FREE_BYTES} characters in JSON "
            "that is not as safetensors writes it",
            f"{tensors} opening braces, {values} commas and {len(text)} characters",
        )
    try:
        entries = load_header_json(text)
    except (ValueError, RecursionError) as error:
        raise not_json(error, file) from error
    metadata = entries.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        refuse_entry(file, "__metadata__", "an object of strings", shown(metadata))
    types, starts, ends = _columns(entries, file)
    return dict(zip(entries, types, strict=True)), starts, ends


def over_limit(file: str, expected: str, found: str) -> SourceError:
    """The error for a header that would take too much memory."""
    return invalid_header(
        file,
        message="The header exceeds a limit",
        expected=expected,
        found=found,
        hint="split the file, or write it with the safetensors library",
    )


def not_json(error: Exception, file: str) -> SourceError:
    """The error for a header that is not JSON, or not UTF-8."""
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
            refuse_entry(file, name, "an object with dtype, shape and data_offsets", shown(entry))
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
            raise invalid_header(
                file,
                tensor=shortened(name),
                expected="a dtype of the safetensors format",
                found=shown(dtype),
                hint=_NEWER if isinstance(dtype, str) and _DTYPE.fullmatch(dtype) else COPY_AGAIN,
            )
        if not isinstance(shape, list) or not sizes(shape):
            refuse_entry(file, name, "a shape of whole numbers that are not negative", shown(shape))
        if len(shape) > MAX_DIMENSIONS:
            refuse_entry(file, name, f"at most {MAX_DIMENSIONS} dimensions", str(len(shape)))
        if overflows(TensorType(dtype, tuple(shape))):
            refuse_entry(file, name, "a size that fits in 64 bits", shown(shape))
        if not sizes(offsets) or not isinstance(offsets, list) or len(offsets) != 2:
            refuse_entry(file, name, "two data_offsets that are not negative", shown(offsets))
    raise AssertionError("no bad entry in a header that failed its checks")  # pragma: no cover


def check_data(file: str, tensors: dict[str, TensorType], starts: Sequence[int], ends: Sequence[int]) -> int:
    """Check that byte ranges have the sizes of their tensors and cover the data; returns the size of the data.

    Raises:
        SourceError: they do not.
    """
    _check_sizes(file, tensors, starts, ends)
    _check_coverage(file, tensors, starts, ends)
    return max(ends, default=0)


def _check_sizes(file: str, tensors: dict[str, TensorType], starts: Sequence[int], ends: Sequence[int]) -> None:
    """Every byte range is as long as dtype and shape say."""
    for (name, found), start, end in zip(tensors.items(), starts, ends, strict=True):
        if found.bits != 8 * (end - start):
            expected = f"{found.bits / 8:g} bytes for {found.dtype} {list(found.shape)}"
            refuse_entry(file, name, expected, f"data_offsets that span {end - start} bytes")


def _check_coverage(file: str, names: Iterable[str], starts: Sequence[int], ends: Sequence[int]) -> None:
    """The ranges cover the data from 0 without overlap or hole."""
    position = 0
    for start, end, name in sorted(zip(starts, ends, names, strict=True)):
        if start != position:
            kind = "leaves a hole before" if start > position else "overlaps the tensor before"
            refuse_entry(file, name, f"data that starts at {position}", f"data that starts at {start} and {kind} it")
        position = end


def refuse_entry(file: str, tensor: str, expected: str, found: str) -> NoReturn:
    """Raise the error for an invalid entry."""
    raise invalid_header(file, tensor=shortened(tensor), expected=expected, found=found)
