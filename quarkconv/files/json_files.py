"""Reading the JSON files of a checkpoint: bounded and strict."""

from __future__ import annotations

import codecs
import json
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import COPY_AGAIN, SourceError
from quarkconv.files.base import Files
from quarkconv.files.regular import CHECK_ACCESS, FETCH_POINTER, LFS_POINTER, leads_outside, read_regular
from quarkconv.text import shown

MAX_CONFIG_BYTES: Final = 32 * 2**20
MAX_INDEX_BYTES: Final = 100_000_000
MAX_VALUES: Final = 1_200_000
"""The number of values in a large file: a few bytes of JSON can take a hundred bytes of memory."""
_LARGE: Final = 12_000_000
MAX_DEPTH: Final = 100
_MARKS: Final = (codecs.BOM_UTF8, codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
"""Byte order marks, at which transformers, vLLM and SGLang fail."""


def read_json_object(path: Path, *, code: str, limit: int, values: int = MAX_VALUES) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        code: finding code of its errors.
        limit: largest size in bytes.
        values: largest number of JSON values in a file of more than 12 MB.

    Raises:
        SourceError: the file is missing, not a regular file, a link to outside of the directory, larger than
            ``limit``, has too many values, is not UTF-8, not JSON, nested more than 100 deep, or not an object.
    """
    return parse_json_object(_read(path, code, limit, values), path.name, code=code)


def has_file(files: Files, name: str) -> bool:
    """Whether there is a file of this name, a broken link included."""
    path = files.path(name)
    return files.size(name) is not None if path is None else path.exists() or path.is_symlink()


def read_json_of(files: Files, name: str, *, code: str, limit: int, values: int = MAX_VALUES) -> dict[str, Any]:
    """As :func:`read_json_object`, for a file that may be remote.

    Raises:
        SourceError: as :func:`read_json_object`; or the file cannot be fetched.
    """
    return parse_json_object(read_bytes_of(files, name, code=code, limit=limit, values=values), name, code=code)


def read_bytes_of(files: Files, name: str, *, code: str, limit: int, values: int = MAX_VALUES) -> bytes:
    """The bytes of a JSON file that may be remote, to be parsed by :func:`parse_json_object`.

    Raises:
        SourceError: the file is missing, not a regular file, a link to outside of the directory, larger than ``limit``
            or has too many values; or it cannot be fetched.
    """
    path = files.path(name)
    if path is not None:
        return _read(path, code, limit, values)
    size = files.size(name)
    if size is None:
        raise _missing(name, code)
    if size > limit:
        raise _too_much(name, code, f"at most {limit} bytes", f"{size} bytes")
    return _bounded(files.read(name, 0, size), name, code, values)


def _read(path: Path, code: str, limit: int, values: int) -> bytes:
    try:
        raw = read_regular(path, limit)
    except FileNotFoundError as error:
        raise _missing(path.name, code) from error
    except (OSError, ValueError) as error:
        raise SourceError(
            "The file cannot be read",
            code=code,
            file=path.name,
            found=getattr(error, "strerror", None) or str(error),
            hint=CHECK_ACCESS if isinstance(error, PermissionError) else "download or copy the checkpoint again",
        ) from error
    outside = leads_outside(path.parent, path.name)
    if outside is not None:
        raise link_error(path.name, outside)
    if isinstance(raw, int):
        raise _too_much(path.name, code, f"at most {limit} bytes", f"{raw} bytes")
    return _bounded(raw, path.name, code, values)


def _bounded(raw: bytes, name: str, code: str, values: int) -> bytes:
    """The same bytes, refused where they are many and have too many values."""
    if len(raw) > _LARGE:
        found = raw.count(b"{") + raw.count(b"[") + raw.count(b",")
        if found > values:
            raise _too_much(name, code, f"at most {values} values", f"{found} separators")
    return raw


def parse_json_object(raw: bytes, name: str, *, code: str) -> dict[str, Any]:
    """Parse the bytes of a file ``name`` that holds one JSON object.

    Raises:
        SourceError: they are not UTF-8, not JSON, nested more than 100 deep, or not an object; or a pointer of Git LFS.
    """
    if raw.startswith(LFS_POINTER):
        found = f"a text of {len(raw)} bytes"
        raise SourceError(
            "The file is a Git LFS pointer, without the content",
            code=code,
            file=name,
            found=found,
            hint=FETCH_POINTER,
        )
    if raw.startswith(_MARKS):
        raise SourceError(
            "The file starts with a byte order mark, and engines fail on it",
            code=code,
            file=name,
            expected="UTF-8 without a byte order mark",
            found=raw[:3].hex(" "),
            hint="save the file again as UTF-8 without a byte order mark",
        )
    try:
        value = json.loads(raw.decode())
        if raw.count(b"{") + raw.count(b"[") > MAX_DEPTH and not _is_shallow(value):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        raise SourceError(
            "The file is not valid JSON",
            code=code,
            file=name,
            found=str(error) or "nesting too deep",
            hint=COPY_AGAIN,
        ) from error
    if not isinstance(value, dict):
        raise SourceError(
            "The file is not a JSON object",
            code=code,
            file=name,
            expected="an object",
            found=shown(value),
            hint=COPY_AGAIN,
        )
    return value


def link_error(file: str, target: str) -> SourceError:
    """The error for a file that is a link to outside of the checkpoint."""
    return SourceError(
        "The file is a link that leads out of the model's directory",
        code="file-outside",
        file=file,
        expected="a file in the directory",
        found=f"a link to {target}",
        hint="if you created the link, replace it with the file (`cp` follows links) or a hard link (`ln`)",
    )


def _missing(name: str, code: str) -> SourceError:
    return SourceError("The file does not exist", code=code, file=name, hint="download or copy the checkpoint again")


def _too_much(name: str, code: str, expected: str, found: str) -> SourceError:
    return SourceError("The file is too large", code=code, file=name, expected=expected, found=found, hint=COPY_AGAIN)


def _is_shallow(value: object) -> bool:
    """Whether a value is nested at most :data:`MAX_DEPTH` deep, since later code may recurse."""
    level: list[object] = [value]
    for _ in range(MAX_DEPTH):
        level = [
            child
            for item in level
            if isinstance(item, (dict, list))
            for child in (item.values() if isinstance(item, dict) else item)
        ]
        if not level:
            return True
    return False
