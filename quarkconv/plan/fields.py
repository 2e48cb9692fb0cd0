"""Strict reading of the JSON values of plans and manifests: each function returns a value of its type, or raises."""

from __future__ import annotations

import re
from typing import Final

from quarkconv.files.base import is_inside

_CHECKSUM: Final = re.compile("[0-9a-f]{32}")


def text(value: object) -> str:
    """A string.

    Raises:
        TypeError: anything else.
    """
    if not isinstance(value, str):
        raise TypeError(f"expected a string, found {value!r:.40}")
    return value


def count(value: object) -> int:
    """A whole number of at most 63 bits.

    Raises:
        TypeError: anything else.
    """
    if type(value) is not int or not 0 <= value < 2**63:
        raise TypeError(f"expected a whole number, found {value!r:.40}")
    return value


def file_name(value: object) -> str:
    """A relative path that stays inside its directory.

    Raises:
        TypeError: not a string.
        ValueError: an absolute path, one with ``..``, or one that no file can have.
    """
    name = text(value)
    name.encode()  # raises for half a surrogate pair, which no file name contains
    if not is_inside(name):
        raise ValueError(f"not a path inside the checkpoint: {name!r:.80}")
    return name


def checksum(value: object) -> str:
    """A checksum as 32 hexadecimal digits.

    Raises:
        ValueError: anything else.
    """
    if not are_checksums([value]):
        raise ValueError(f"not a checksum: {value!r:.40}")
    return text(value)


def are_checksums(values: object) -> bool:
    """Whether a value is a list of checksums."""
    return isinstance(values, list) and all(isinstance(item, str) and _CHECKSUM.fullmatch(item) for item in values)
