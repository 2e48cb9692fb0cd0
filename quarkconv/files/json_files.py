"""Reading the JSON files of a checkpoint: bounded, strict, with one error for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.files.regular import leads_outside, read_regular

MAX_CONFIG_BYTES: Final = 32 * 2**20
MAX_INDEX_BYTES: Final = 100_000_000
MAX_VALUES: Final = 1_200_000
"""How many values a large file may hold: a few bytes of JSON can become a hundred of memory."""
_LARGE: Final = 12_000_000
MAX_DEPTH: Final = 100


def read_json_object(path: Path, *, code: str, limit: int, values: int = MAX_VALUES) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        code: finding code for whatever is wrong with it.
        limit: largest size in bytes that is read.
        values: how many JSON values it may hold, if it is larger than 12 MB.

    Raises:
        SourceError: missing, no regular file, a link that leads out of the directory, larger than ``limit``, of too
            many values, not UTF-8, not JSON, nested more than 100 deep, or not an object.
    """
    try:
        raw = read_regular(path, limit)
    except (OSError, ValueError) as error:
        raise SourceError(
            "The file cannot be read", code=code, file=path.name,
            found=getattr(error, "strerror", None) or str(error), hint="download or copy the checkpoint again",
        ) from error  # fmt: skip
    outside = leads_outside(path.parent, path.name)
    if outside is not None:
        raise link_error(path.name, outside)
    if isinstance(raw, int):
        raise _too_much(path.name, code, f"at most {limit} bytes", f"{raw} bytes")
    return _parse(raw, path.name, code, values)


def read_json_of(files: Files, name: str, *, code: str, limit: int, values: int = MAX_VALUES) -> dict[str, Any]:
    """The same of a file that may be elsewhere than on disk.

    Raises:
        SourceError: as :func:`read_json_object`, and the file could not be had.
    """
    path = files.path(name)
    if path is not None:
        return read_json_object(path, code=code, limit=limit, values=values)
    size = files.size(name)
    if size is None:
        raise SourceError("The file cannot be read", code=code, file=name, found="no such file in the repo")
    if size > limit:
        raise _too_much(name, code, f"at most {limit} bytes", f"{size} bytes")
    return _parse(files.read(name, 0, size), name, code, values)


def _parse(raw: bytes, name: str, code: str, values: int) -> dict[str, Any]:
    brackets = raw.count(b"{") + raw.count(b"[")
    if len(raw) > _LARGE:
        found = brackets + raw.count(b",")
        if found > values:
            raise _too_much(name, code, f"at most {values} values", f"{found} separators")
    try:
        value = json.loads(raw)
        if brackets > MAX_DEPTH and not _is_shallow(value):
            raise RecursionError
    except (ValueError, RecursionError) as error:
        raise SourceError(
            "The file is not valid JSON", code=code, file=name, found=str(error) or "nesting too deep",
            hint="download or copy the file again",
        ) from error  # fmt: skip
    if not isinstance(value, dict):
        raise SourceError(
            "The file does not hold a JSON object", code=code, file=name,
            expected="an object", found=type(value).__name__,
        )  # fmt: skip
    return value


def link_error(file: str, target: str) -> SourceError:
    """The error for a file of a checkpoint that is a link to somewhere else."""
    return SourceError(
        "The file is a link that leads out of the model's directory", code="file-outside", file=file,
        expected="a file in the directory", found=f"a link to {target}",
        hint="if you made the link yourself, replace it by the file (`cp` follows links) or by a hard link (`ln`)",
    )  # fmt: skip


def _too_much(name: str, code: str, expected: str, found: str) -> SourceError:
    return SourceError("The file is too large to be believed", code=code, file=name, expected=expected, found=found)


def _is_shallow(value: object) -> bool:
    """Whether a value is nested at most :data:`MAX_DEPTH` deep: what handles it later may call itself."""
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
