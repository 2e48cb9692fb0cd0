"""Files that are put together by hand, byte by byte."""

from __future__ import annotations

import json
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def raw_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file.

    Args:
        header: text, bytes, or a value to write as JSON.
        data: all that follows.
        length: of the header, as the first eight bytes state it; the true one where None.
    """
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str, shape: Sequence[Any], start: int, end: int) -> dict[str, Any]:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def write_json(path: Path, value: object) -> None:
    """Write a value as JSON."""
    path.write_text(json.dumps(value))
