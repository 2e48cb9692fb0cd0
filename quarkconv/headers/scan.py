"""Reading a safetensors header in the one form in which tools write it, at the speed of a regular expression.

safetensors, and whoever follows it, writes compact JSON with the keys of an entry in a fixed order and the tensors in
the order of their data. For such a header the grammar below is the whole truth: every character is accounted for, so
whatever it accepts, a JSON parser reads in the same way. Anything else, be it valid or not, is left to the JSON parser,
which also knows what to say about it. This halves the time in which a large checkpoint is inspected.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple

from quarkconv.dtypes import TensorType

# No escapes and no control characters in strings: they stand for themselves.
_START: Final = re.compile(
    r'\{(?:"__metadata__":\{(?:"[^"\\\x00-\x1f]*":"[^"\\\x00-\x1f]*"(?:,(?=")|(?=\})))*\},)?(?=")'
)
_ENTRY: Final = re.compile(
    r'"([^"\\\x00-\x1f]+)":\{"dtype":"([A-Z0-9_]+","shape":\[[\d,]*)\],"data_offsets":\[(\d+),(\d+)\]\}[,}]',
    re.ASCII,
)
_KIND: Final = re.compile(r'([A-Z0-9_]+)","shape":\[((?:(?:0|[1-9]\d{0,17})(?:,(?!$)|$))*)', re.ASCII)
_MAX_DIGITS: Final = 18
_MAX_KIND: Final = 300


class Scanned(NamedTuple):
    """The entries of a header as columns: names, (dtype, shape), and where the data of each ends.

    Each starts where the one before ends, the first at 0.
    """

    names: Sequence[str]
    types: Sequence[TensorType]
    ends: Sequence[int]


def scan_header(text: str) -> Scanned | None:
    """The entries of a header, checked for their form only; None when it is not in the expected form."""
    start = _START.match(text)
    body = text.rstrip(" ")
    if start is None or not body.endswith("]}}") or body.count("]}}") != 1:
        return None
    # Splitting leaves what is between the entries: nothing, if the grammar accounts for all there is. Entries are
    # followed by a comma, and the last one, where the only "]}}" is, by the brace that closes the header.
    parts = _ENTRY.split(body[start.end() :])
    between, names, type_texts, starts, ends = (parts[column::5] for column in range(5))
    if any(between) or not names or len(set(names)) != len(names):
        return None
    if starts[0] != "0" or starts[1:] != ends[:-1]:
        return None
    if "__metadata__" in names:  # of another form than metadata has
        return None
    if any(end != "0" for end in ends if end[0] == "0") or max(map(len, ends)) > _MAX_DIGITS:
        return None
    distinct = set(type_texts)
    if max(map(len, distinct)) > _MAX_KIND:
        return None
    types = {type_text: _parse_type(type_text) for type_text in distinct}
    resolved = [kind for kind in map(types.__getitem__, type_texts) if kind is not None]
    return Scanned(names, resolved, tuple(map(int, ends))) if len(resolved) == len(names) else None


@lru_cache(maxsize=4096)  # also makes equal types one object, across the files of a checkpoint
def _parse_type(text: str) -> TensorType | None:
    match = _KIND.fullmatch(text)
    if match is None:
        return None
    return TensorType(match[1], tuple(map(int, match[2].split(","))) if match[2] else ())
