"""Reading the JSON files of a checkpoint: bounded, strict, with one error for whatever is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import SourceError

MAX_CONFIG_BYTES: Final = 32 * 2**20
MAX_INDEX_BYTES: Final = 512 * 2**20


def read_json_object(path: Path, *, code: str, limit: int) -> dict[str, Any]:
    """Read a file that holds one JSON object.

    Args:
        path: the file.
        code: finding code for whatever is wrong with it.
        limit: largest size in bytes that is read.

    Raises:
        SourceError: missing, larger than ``limit``, not UTF-8, not JSON, or not an object.
    """
    try:
        size = path.stat().st_size
        if size > limit:
            raise SourceError(
                "The file is too large to be believed", code=code, file=path.name,
                expected=f"at most {limit} bytes", found=f"{size} bytes",
            )  # fmt: skip
        value = json.loads(path.read_bytes())
    except OSError as error:
        raise SourceError(
            "The file cannot be read", code=code, file=path.name, found=error.strerror or str(error),
            hint="download or copy the checkpoint again",
        ) from error  # fmt: skip
    except (ValueError, RecursionError) as error:
        raise SourceError(
            "The file is not valid JSON", code=code, file=path.name, found=str(error) or "nesting too deep",
            hint="download or copy the file again",
        ) from error  # fmt: skip
    if not isinstance(value, dict):
        raise SourceError(
            "The file does not hold a JSON object", code=code, file=path.name,
            expected="an object", found=type(value).__name__,
        )  # fmt: skip
    return value
