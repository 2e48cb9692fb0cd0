"""Text for people: sizes, counts and plurals; values from files, shortened whatever they are."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from itertools import islice
from typing import Final

_LENGTH: Final = 80
_ITEMS: Final = 5
_DEPTH: Final = 4
_MAX_NAME: Final = 200
_EXAMPLES: Final = 2


def size(nbytes: int) -> str:
    """Bytes in decimal units, as the Hub shows them: ``1.24 MB``."""
    value = float(nbytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 999.5:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} TB"


def plural(count: int, noun: str, nouns: str | None = None) -> str:
    """``1 shard``, ``2 shards``; ``nouns`` is the plural where it is irregular."""
    return f"{count:,} {noun if count == 1 else nouns or noun + 's'}"


def shown(value: object) -> str:
    """A JSON value of any size and depth, escaped and cut to 80 characters."""
    text = json.dumps(_pruned(value, _DEPTH))
    return text if len(text) <= _LENGTH else text[: _LENGTH - 3] + "..."


def shortened(name: str) -> str:
    """A name, cut where it is longer than 200 characters."""
    return name if len(name) <= _MAX_NAME else f"{name[: _MAX_NAME // 2]}... ({len(name)} characters)"


def examples(names: Sequence[str]) -> str:
    """The first two names, shortened, with dots for the others."""
    return ", ".join([*map(shortened, names[:_EXAMPLES]), *(["..."] if len(names) > _EXAMPLES else [])])


def alternatives(names: Iterable[str]) -> str:
    """``a, b or c``."""
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def word(value: object) -> str:
    """A value that should be a string, as one, cut to 80 characters."""
    return (shown(value) if isinstance(value, dict | list) else str(value))[:_LENGTH]


def _pruned(value: object, depth: int) -> object:
    """The part of a value that fits a short text."""
    if isinstance(value, str):
        return value[: _LENGTH + 1]
    if isinstance(value, dict):
        if depth == 0:
            return {}
        return {key[:_LENGTH]: _pruned(item, depth - 1) for key, item in islice(value.items(), _ITEMS)}
    if isinstance(value, list | tuple):
        return [_pruned(item, depth - 1) for item in value[: _ITEMS + 20]] if depth else []
    return value
