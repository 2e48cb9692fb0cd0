"""Small reads joined to larger requests of bounded size, because each request costs a round trip."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from quarkconv.files.base import Range

BLOCK_BYTES: Final = 8 * 2**20
"""The largest request in bytes."""
GAP_BYTES: Final = 128 * 2**10
"""The largest gap in bytes that is read and dropped: fetching it takes less time than a second request."""


def blocks(ranges: Iterable[Range], size: int = BLOCK_BYTES, gap: int = GAP_BYTES) -> Iterator[Range]:
    """Ranges joined where one follows another in the same file, or nearly, and cut where they are longer than ``size``.

    The blocks are in the order of the ranges, so that a reader of the ranges needs one block after the other.
    """
    run: Range | None = None
    for item in ranges:
        if item.end <= item.start:
            continue
        if run is not None and item.file == run.file and 0 <= item.start - run.end <= gap:
            run = Range(run.file, run.start, item.end)
        else:
            if run is not None:
                yield from _cut(run, size)
            run = item
        while run.end - run.start > size:  # yielded at once: a run may be as long as a file
            yield Range(run.file, run.start, run.start + size)
            run = Range(run.file, run.start + size, run.end)
    if run is not None:
        yield from _cut(run, size)


def _cut(run: Range, size: int) -> Iterator[Range]:
    for start in range(run.start, run.end, size):
        yield Range(run.file, start, min(start + size, run.end))
