"""Matching module names against the lists of a quantization config, 100,000 names in bounded time.

Checkpoints are untrusted, and some regular expressions take exponential time. So the ``regex`` package matches ``re:``
patterns, with a timeout and the syntax of ``re``; string methods match simple fnmatch patterns; and a list is limited
in length and in total time.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Callable, Iterable
from fnmatch import translate
from time import thread_time
from typing import Any, Final

from quarkconv.defects import invalid_quantization
from quarkconv.errors import SourceError
from quarkconv.text import shown

MAX_PATTERNS: Final = 2_000
"""Patterns of one list, names aside."""
MAX_PATTERN_CHARACTERS: Final = 50_000
"""Characters of these together."""
_SECONDS: Final = 0.8
_SECONDS_PER_NAME: Final = 8e-6
"""Limit of the processor time of all matches of a config. Real lists take a hundredth of it."""

_FEW: Final = 16
_WILDCARDS: Final = frozenset("*?[")
Test = Callable[[str], object]


def is_pattern(entry: str) -> bool:
    """True when fnmatch would not read ``entry`` as a plain name."""
    return not _WILDCARDS.isdisjoint(entry)


def _is_cheap(patterns: list[str]) -> bool:
    """True for a few patterns that string methods match: their time is linear, and measuring it would cost more."""
    return len(patterns) <= _FEW and not any(is_pattern(pattern.strip("*")) for pattern in patterns)


class TimeLimit:
    """The time left to match the patterns of one config."""

    def __init__(self) -> None:
        self._left = _SECONDS

    def guard(self, test: Test) -> Test:
        """The same test, which raises SourceError when all tests together exceed the limit."""

        def guarded(name: str) -> object:
            started = thread_time()
            try:
                return test(name)
            except TimeoutError:
                self._left = 0.0
                raise _too_slow() from None
            finally:
                self._left += _SECONDS_PER_NAME - (thread_time() - started)
                if self._left < 0:
                    raise _too_slow()

        return guarded


def glob_matcher(pattern: str) -> Test:
    """A test of names against one fnmatch pattern, case-sensitive, over the whole name (``*`` crosses dots)."""
    if not is_pattern(pattern):
        return pattern.__eq__
    inner = pattern.strip("*")
    if is_pattern(inner):
        return re.compile(translate(pattern)).match
    if pattern.startswith("*"):
        return (lambda name: inner in name) if pattern.endswith("*") else (lambda name: name.endswith(inner))
    return lambda name: name.startswith(inner)


def regex_matcher(pattern: str) -> Test | None:
    """A test of names against a regular expression, from the start of the name; None when it is not one.

    The test raises ``TimeoutError`` when it takes too long.
    """
    import regex  # slow to import, and few configs need it

    try:
        with warnings.catch_warnings(action="ignore"):  # such as: the meaning of "[[" may change
            match: Callable[..., Any] = regex.compile(pattern).match
    except Exception:  # its parser raises more than it documents
        return None
    return lambda name: match(name, timeout=_SECONDS)


def name_filter(
    entries: Iterable[str], *, globs: bool, limit: TimeLimit, on_invalid: Callable[[str], object] = lambda _: None
) -> Callable[[str], object]:
    """A test of module names against a list of names and patterns.

    Args:
        entries: exact names, ``re:`` patterns (matched from the start of the name, as engines do), and fnmatch
            patterns where ``globs`` is true. A ``re:`` pattern that does not compile matches nothing.
        globs: True where ``*``, ``?`` and ``[`` are wildcards outside of ``re:`` patterns.
        limit: the time left.
        on_invalid: is called with each ``re:`` pattern that does not compile.

    Raises:
        SourceError: the patterns are too many, or too long.
    """
    exact: set[str] = set()
    expressions: list[str] = []
    patterns: list[str] = []
    ends: list[str] = []
    for entry in entries:
        if entry.startswith("re:"):
            expressions.append(entry[3:])
        elif not globs or not is_pattern(entry):
            exact.add(entry)
        elif entry[0] == "*" and not is_pattern(entry[1:]):
            ends.append(entry[1:])
        else:
            patterns.append(entry)
    check_number(expressions)
    check_number(patterns)
    tests = [*map(glob_matcher, patterns)]
    for expression in expressions:
        matcher = regex_matcher(expression)
        if matcher is None:
            on_invalid(f"re:{expression}")
        else:
            tests.append(matcher)
    if not tests and not ends:
        return exact.__contains__
    suffixes = tuple(ends)
    if not tests and len(ends) <= _FEW:
        return lambda name: name in exact or name.endswith(suffixes)
    patterned: Test = lambda name: name.endswith(suffixes) or any(test(name) for test in tests)  # noqa: E731
    if expressions or len(ends) > _FEW or not _is_cheap(patterns):
        patterned = limit.guard(patterned)
    return lambda name: name in exact or patterned(name)


def first_match(keys: Iterable[str], limit: TimeLimit) -> Callable[[str], int | None]:
    """A lookup of the position of the first key that matches a name: a name, or an fnmatch pattern.

    Raises:
        SourceError: the patterns are too many, or too long.
    """
    exact: dict[str, int] = {}
    patterns: list[tuple[int, str]] = []
    for position, key in enumerate(keys):
        if is_pattern(key):
            patterns.append((position, key))
        else:
            exact[key] = position
    check_number([key for _, key in patterns])
    tests = [(position, glob_matcher(key)) for position, key in patterns]

    def find(name: str) -> int | None:
        found = exact.get(name)
        for position, test in tests:
            if found is not None and found < position:
                break
            if test(name):
                return position
        return found

    if not tests:
        return exact.get
    if _is_cheap([key for _, key in patterns]):
        return find
    guarded: Callable[[str], Any] = limit.guard(find)
    return guarded


def check_number(patterns: list[str]) -> None:
    """Refuse a list of patterns that is over the limits.

    Raises:
        SourceError: the patterns are too many, or too long.
    """
    characters = sum(map(len, patterns))
    if len(patterns) > MAX_PATTERNS or characters > MAX_PATTERN_CHARACTERS:
        raise invalid_quantization(
            "The quantization config has too many patterns",
            expected=f"at most {MAX_PATTERNS} patterns of {MAX_PATTERN_CHARACTERS} characters",
            found=f"{len(patterns)} of {characters}, such as {shown(patterns[0])}",
            hint="list modules by their names",
        )


def _too_slow() -> SourceError:
    return invalid_quantization(
        "The patterns of the quantization config take too long to match",
        expected=f"about {_SECONDS:g} s for all names",
        found="more",
        hint="list modules by their names, instead of patterns with many * or with re:",
    )
