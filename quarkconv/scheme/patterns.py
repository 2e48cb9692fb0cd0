"""Matching module names against the lists of a quantization config, many thousand times."""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from fnmatch import translate

_WILDCARDS = frozenset("*?[")


def is_pattern(entry: str) -> bool:
    """True when fnmatch would not read ``entry`` as a plain name."""
    return not _WILDCARDS.isdisjoint(entry)


def glob_matcher(pattern: str) -> Callable[[str], object]:
    """A test of names against one fnmatch pattern, case-sensitive, over the whole name (``*`` crosses dots)."""
    return re.compile(translate(pattern)).match if is_pattern(pattern) else pattern.__eq__


def regex_matcher(pattern: str) -> Callable[[str], object] | None:
    """A test of names against a regular expression, from the start of the name; None when it is not one."""
    try:
        with warnings.catch_warnings(action="ignore"):  # such as: the meaning of "[[" may change
            return re.compile(pattern).match
    except (re.error, OverflowError, RecursionError):
        return None


def name_filter(entries: Iterable[str], *, globs: bool) -> Callable[[str], bool]:
    """A test whether a module name is in a list of names and patterns.

    Args:
        entries: exact names, ``re:`` patterns (matched from the start of the name, as engines do), and fnmatch
            patterns where ``globs`` is true. A ``re:`` pattern that does not compile matches nothing.
        globs: whether ``*``, ``?`` and ``[`` have a meaning outside of ``re:`` patterns.
    """
    exact: set[str] = set()
    matchers: list[Callable[[str], object]] = []
    for entry in entries:
        if entry.startswith("re:"):
            matcher = regex_matcher(entry[3:])
            if matcher is not None:
                matchers.append(matcher)
        elif globs and is_pattern(entry):
            matchers.append(glob_matcher(entry))
        else:
            exact.add(entry)
    if not matchers:
        return exact.__contains__
    return lambda name: name in exact or any(match(name) for match in matchers)
