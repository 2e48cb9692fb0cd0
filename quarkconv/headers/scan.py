"""Fast paths for headers and indexes as tools write them: string methods instead of a JSON parser.

The safetensors library writes compact JSON, the keys of an entry in a fixed order and the tensors in the order of their
data, each of which starts where the data before it ends::

    {"a.weight":{"dtype":"I8","shape":[2,3],"data_offsets":[0,6]},"a.weight_scale":{"dtype":...

Names and types determine such a header. The scanner splits it at the text between them, and compares the offsets with
the only ones that are possible. Every character is accounted for, so that a JSON parser reads the same from whatever a
scanner accepts. Any other text, valid or not, goes to the JSON parser, which also explains the error.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from functools import lru_cache
from itertools import accumulate, groupby
from operator import itemgetter
from typing import Final, NamedTuple

from quarkconv.dtypes import TensorType, is_tensor_type

_START: Final = re.compile(r'\{(?:"__metadata__":\{(?:"[^"\\\x00-\x1f]*":"[^"\\\x00-\x1f]*"(?:,(?=")|(?=\})))*\},)?"')
_BEFORE_TYPE: Final = '":{"dtype":"'
_TYPE: Final = re.compile(r'([A-Z0-9_]+)","shape":\[((?:(?:0|[1-9]\d{0,17})(?:,(?=\d)|(?=\])))*)\]', re.ASCII)
_BEFORE_OFFSETS: Final = ',"data_offsets":['
_MAX_TYPE_LENGTH: Final = 300
_MAX_END: Final = 10**18
_OTHER_NAMES: Final = ("", "__metadata__")
"""Names that the fast path leaves to the JSON parser: an empty one, and of metadata that is not as above."""

_WEIGHT_MAP: Final = b'"weight_map"'
_SPACE: Final = r"[ \t\r\n]*"
_MAP_START: Final = re.compile(rf"{_SPACE}:{_SPACE}\{{{_SPACE}(?=\")".encode())
_MAP_END: Final = re.compile(rf"{_SPACE}\}}{_SPACE}\}}{_SPACE}".encode())
_COLON: Final = re.compile(f"{_SPACE}:{_SPACE}")
_COMMA: Final = re.compile(f"{_SPACE},{_SPACE}")
_PART: Final = 2**14
"""Bytes of an index that are split at a time."""

_NOT_LITERAL: Final = bytes(range(32)) + b'"\\'
"""Characters that are escaped in a JSON string."""


class Scanned(NamedTuple):
    """The entries of a header, all rules of the format checked; the data of each starts where the data before it ends.

    Attributes:
        tensors: name -> dtype and shape, in the order of the data. Equal types are one object.
        ends: where the data of each tensor ends.
    """

    tensors: dict[str, TensorType]
    ends: list[int]


def scan_header(text: str) -> Scanned | None:
    """The entries of a header; None for a header that needs the JSON parser."""
    start = _START.match(text)
    if start is None:
        return None
    *entries, last = text[start.end() :].rstrip(" ").split(_BEFORE_OFFSETS)
    if not entries:
        return None
    # An entry: offsets of the tensor before it, a quote, its name, and its type. The last offsets come after it.
    heads, _, type_texts = zip(*[entry.partition(_BEFORE_TYPE) for entry in entries], strict=True)
    distinct = set(type_texts)
    types = {type_text: found for type_text in distinct if (found := _parse_type(type_text)) is not None}
    if len(types) != len(distinct):
        return None
    sizes = {type_text: found.nbytes for type_text, found in types.items()}
    ends = list(accumulate(map(sizes.__getitem__, type_texts)))
    numbers = list(map(str, ends))
    offsets = ["", *[f'{start},{end}]}},"' for start, end in zip(["0", *numbers[:-1]], numbers, strict=True)]]
    if offsets.pop() != f'{last[:-1]},"' or not last.endswith("}") or ends[-1] > _MAX_END:
        return None
    if not all(map(str.startswith, heads, offsets)):
        return None
    names = list(map(str.removeprefix, heads, offsets))
    tensors = dict(zip(names, map(types.__getitem__, type_texts), strict=True))
    if len(tensors) != len(entries) or not tensors.keys().isdisjoint(_OTHER_NAMES) or not _are_literal(names):
        return None
    return Scanned(tensors, ends)


class Run(NamedTuple):
    """Entries of a weight_map that follow one another and are in the same file: its name, and theirs."""

    file: str
    names: list[str]


class ScannedIndex(NamedTuple):
    """An index.

    Attributes:
        runs: the entries of the weight_map, in its order.
        rest: the JSON without the entries of the weight_map, not checked.
    """

    runs: list[Run]
    rest: bytes


def scan_index(raw: bytes) -> ScannedIndex | None:
    """The entries of an index, whose weight_map tools write last; None for an index that needs the JSON parser."""
    key = raw.find(_WEIGHT_MAP)
    if key < 0 or b"\\" in raw[:key] or not raw.isascii():
        return None
    before, last = key + len(_WEIGHT_MAP), raw.rfind(b'"') + 1
    start, end = _MAP_START.match(raw, before), _MAP_END.fullmatch(raw, last)
    if start is None or end is None:
        return None
    runs: list[Run] = []
    position = start.end()
    while position < last:  # part by part, since memory that is used again costs the least time
        stop = raw.find(b'",', position + _PART) + 1 or last
        comma, _, part = raw[position:stop].decode().partition('"')
        found = _one_run(part) or _several_runs(part)
        if found is None or (runs and not _COMMA.fullmatch(comma)):
            return None
        runs += found
        position = stop
    return ScannedIndex(runs, raw[:before] + b":{" + raw[last:])


def _one_run(part: str) -> list[Run] | None:
    """The entries of a part of a weight_map, without its first quote; None where they are of several files.

    Between two names, the text is then always the same. The part is split at that text, one string for each entry.
    """
    head = part.split('"', 4)  # a name, a colon, a file, a comma, and all other entries
    if len(head) < 4:
        return None
    _, colon, file, comma = head[:4]
    end = f'"{colon}"{file}"'
    names = part.removesuffix(end).split(f'{end}{comma}"')
    separated = _COLON.fullmatch(colon) and (len(names) == 1 or _COMMA.fullmatch(comma))
    if not separated or not part.endswith(end) or not _are_literal([file, *names]):
        return None
    return [Run(file, names)]


def _several_runs(part: str) -> list[Run] | None:
    """The entries of a part of a weight_map, without its first quote; None where the JSON parser has to read it."""
    texts = part.split('"')
    keys, colons, values, commas = (texts[column::4] for column in range(4))
    if len(texts) % 4 or commas.pop() or not _are_all(_COLON, colons) or not _are_all(_COMMA, commas):
        return None
    if not _are_literal(keys) or not _are_literal(dict.fromkeys(values)):
        return None
    return runs_of(zip(keys, values, strict=True))


def runs_of(entries: Iterable[tuple[str, str]]) -> list[Run]:
    """The entries (name, file) of a weight_map as runs."""
    return [Run(file, [name for name, _ in run]) for file, run in groupby(entries, itemgetter(1))]


def _are_all(separator: re.Pattern[str], texts: list[str]) -> bool:
    """Whether texts are all the same separator."""
    return not texts or (texts.count(texts[0]) == len(texts) and separator.fullmatch(texts[0]) is not None)


def _are_literal(names: Iterable[str]) -> bool:
    """Whether a JSON string of each name consists of the same characters."""
    joined = "".join(names).encode()
    return len(joined.translate(None, _NOT_LITERAL)) == len(joined)


@lru_cache(maxsize=4096)  # equal types become one object, across the files of a checkpoint
def _parse_type(text: str) -> TensorType | None:
    match = _TYPE.fullmatch(text) if len(text) <= _MAX_TYPE_LENGTH else None
    if match is None:
        return None
    found = TensorType(match[1], tuple(map(int, match[2].split(","))) if match[2] else ())
    return found if is_tensor_type(found) and found.nbytes * 8 == found.bits else None
