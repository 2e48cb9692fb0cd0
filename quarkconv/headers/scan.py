"""A fast path for safetensors headers as tools write them: one regular expression instead of a JSON parser.

The safetensors library writes compact JSON, the keys of an entry in a fixed order and the tensors in the order of their
data. The grammar below accounts for every character of such a header, so a JSON parser reads the same from whatever it
accepts. Any other header, valid or not, goes to the JSON parser, which also explains what is wrong with it. This halves
the time to inspect a large checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from quarkconv.dtypes import TensorType

# Strings without escapes and control characters: every character is literal.
_START: Final = re.compile(
    r'\{(?:"__metadata__":\{(?:"[^"\\\x00-\x1f]*":"[^"\\\x00-\x1f]*"(?:,(?=")|(?=\})))*\},)?(?=")'
)
_ENTRY: Final = re.compile(
    r'"([^"\\\x00-\x1f]+)":\{"dtype":"([A-Z0-9_]+","shape":\[[\d,]*)\],"data_offsets":\[(\d+),(\d+)\]\}[,}]',
    re.ASCII,
)
_TYPE: Final = re.compile(r'([A-Z0-9_]+)","shape":\[((?:(?:0|[1-9]\d{0,17})(?:,(?!$)|$))*)', re.ASCII)
_MAX_DIGITS: Final = 18
_MAX_TYPE_LENGTH: Final = 300


class Scanned(NamedTuple):
    """The entries of a header as columns. The data of each starts where the data before it ends, the first at 0."""

    names: Sequence[str]
    types: Sequence[TensorType]
    ends: Sequence[int]
    distinct_types: Collection[TensorType]


def scan_header(text: str) -> Scanned | None:
    """The entries of a header, of which only the syntax is checked; None for a header that needs the JSON parser."""
    start = _START.match(text)
    body = text.rstrip(" ")
    if start is None or not body.endswith("]}}") or body.count("]}}") != 1:
        return None
    # Splitting also yields the text between entries: empty if the grammar accounts for every character. A comma follows
    # an entry; after the last one, at the only "]}}", the brace that closes the header does.
    parts = _ENTRY.split(body[start.end() :])
    between, names, type_texts, starts, ends = (parts[column::5] for column in range(5))
    if any(between) or not names or len(set(names)) != len(names):
        return None
    if starts[0] != "0" or starts[1:] != ends[:-1]:
        return None
    if "__metadata__" in names:  # metadata that is not an object of strings
        return None
    if any(end != "0" for end in ends if end[0] == "0") or max(map(len, ends)) > _MAX_DIGITS:
        return None
    distinct = set(type_texts)
    if max(map(len, distinct)) > _MAX_TYPE_LENGTH:
        return None
    types = {type_text: _parse_type(type_text) for type_text in distinct}
    resolved = [kind for kind in map(types.__getitem__, type_texts) if kind is not None]
    if len(resolved) != len(names):
        return None
    return Scanned(names, resolved, tuple(map(int, ends)), [kind for kind in types.values() if kind is not None])


@lru_cache(maxsize=4096)  # equal types become one object, across the files of a checkpoint
def _parse_type(text: str) -> TensorType | None:
    match = _TYPE.fullmatch(text)
    if match is None:
        return None
    return TensorType(match[1], tuple(map(int, match[2].split(","))) if match[2] else ())
