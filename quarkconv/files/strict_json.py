"""JSON as the safetensors format means it: stricter than Python's parser."""

from __future__ import annotations

import json
from collections import Counter
from typing import NoReturn

from quarkconv.text import shown


def load_header_json(text: str) -> dict[str, dict[str, object]]:
    """Parse the JSON of a header. The entries are not checked.

    Raises:
        ValueError: not an object, or something that the format does not allow: NaN, a key that occurs twice, half a
            surrogate pair, ``-0``.
        RecursionError: nested too deep.
    """
    if not text.startswith("{"):
        raise ValueError("the header does not start with '{'")
    entries: dict[str, dict[str, object]] = json.loads(text, parse_constant=_no_constant)
    # What Python's parser lets pass, and the format does not, is looked for with a second, slower parse. Headers as
    # tools write them do not need it: the hints are cheap, and may be wrong in one direction only.
    if text.count(":") != _pairs(entries) or "\\u" in text or "-0" in text:
        json.loads(text, object_pairs_hook=_strict_object, parse_int=_strict_int)
    return entries


def _no_constant(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a JSON number")


def _pairs(entries: dict[str, dict[str, object]]) -> int:
    """How many colons a header has that is as it should be: one a pair, four a tensor. A duplicate makes it more."""
    metadata = entries.get("__metadata__", ())
    return 4 * len(entries) + (len(metadata) - 3 if isinstance(metadata, dict) else 0)


def _strict_object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Refuse a key that occurs twice, of which Python keeps the last, and text that is not Unicode."""
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
        raise ValueError("-0 is not a whole number")
    return int(text)
