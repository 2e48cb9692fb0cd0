"""JSON as the safetensors format requires it: stricter than Python's parser."""

from __future__ import annotations

import json
from collections import Counter
from typing import NoReturn

from quarkconv.text import shown


def load_header_json(text: str) -> dict[str, dict[str, object]]:
    """Parse the JSON of a header. The entries are not checked.

    Raises:
        ValueError: not an object, or not allowed by the format: NaN, a duplicate key, half a surrogate pair, ``-0``.
        RecursionError: nested too deep.
    """
    if not text.startswith("{"):
        raise ValueError("no '{' at the start of the header")
    entries: dict[str, dict[str, object]] = json.loads(text, parse_constant=_no_constant)
    # A second, slower parse finds what Python's parser accepts and the format forbids. Headers as tools write them skip
    # it: the test for it is cheap, and may only err towards parsing again.
    if text.count(":") != _pairs(entries) or "\\u" in text or "-0" in text:
        json.loads(text, object_pairs_hook=_strict_object, parse_int=_strict_int)
    return entries


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _pairs(entries: dict[str, dict[str, object]]) -> int:
    """The number of colons in a valid header: one a pair, four a tensor. A duplicate key adds some."""
    metadata = entries.get("__metadata__", ())
    return 4 * len(entries) + (len(metadata) - 3 if isinstance(metadata, dict) else 0)


def _strict_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse duplicate keys, of which Python keeps the last, and text that is not Unicode."""
    for pair in pairs:
        for text in pair:
            if isinstance(text, str) and not text.isascii():
                text.encode()  # half a surrogate pair raises
    found = dict(pairs)
    if len(found) != len(pairs):
        name, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {shown(name)} occurs twice")
    return found


def _strict_int(text: str) -> int:
    if text == "-0":
        raise ValueError("-0 is not an integer")
    return int(text)
