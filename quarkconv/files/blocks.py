"""Small reads joined to larger requests of bounded size, because each request costs a round trip."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Final

from quarkconv.files.base import Range

BLOCK_BYTES: Final = 8 * 2**20
"""The largest request in bytes."""
GAP_BYTES: Final = 128 * 2**10
"""The largest gap in bytes that is read and dropped: fetching it takes less time than a second request."""


def blocks(ranges: Iterable[Range], size: Callable[[], int], gap: int = GAP_BYTES) -> Iterator[Range]:
    """Ranges joined where one follows another in the same file, or nearly, and cut where they are too long.

    The blocks are in the order of the ranges, so that a reader of the ranges needs one block after the other.

    Args:
        ranges: the ranges.
        size: returns the largest size of the next block in bytes.
        gap: bytes between two ranges of one block at most.
    """
    run = Range("", 0, 0)
    for item in ranges:
        if item.end <= item.start:
            continue
        if item.file == run.file and 0 <= item.start - run.end <= gap:
            run = Range(run.file, run.start, item.end)
        else:
            yield from _cut(run, size)
            run = item
        while run.end - run.start > BLOCK_BYTES:  # yielded at once: a run may be as long as a file
            end = run.start + size()
            yield Range(run.file, run.start, end)
            run = Range(run.file, end, run.end)
    yield from _cut(run, size)


def _cut(run: Range, size: Callable[[], int]) -> Iterator[Range]:
    start = run.start
    while start < run.end:
        end = min(start + size(), run.end)
        yield Range(run.file, start, end)
        start = end
