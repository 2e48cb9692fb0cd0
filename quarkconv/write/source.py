"""The interface of a source: a directory, or a repo on the Hub."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from quarkconv.plan.manifest import WrittenFile
from quarkconv.plan.pieces import Copy, SourceFile
from quarkconv.plan.plan import Plan
from quarkconv.write.state import FileState


class Reader(Protocol):
    """Reads byte ranges of a source."""

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a range from ``offset`` on."""


class Source(Protocol):
    """The shards that a plan reads; used by several threads."""

    def check_layout(self, plan: Plan) -> None:
        """Raise if a planned range is not in its tensor any more."""

    def state(self) -> list[FileState]:
        """The identity of each file: its name, size, and time of modification or ETag."""

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise if one of these files changed since the conversion began."""

    @property
    def is_slow(self) -> bool:
        """Whether one reader receives all that the source can send: a second one would only delay the first."""

    def ahead(self, ranges: Iterable[Copy]) -> AbstractContextManager[Reader]:
        """A reader of these ranges, in this order; it may fetch them ahead."""

    def copy(self, file: SourceFile, part: Path) -> WrittenFile:
        """Copy a file of the source as it is, durably."""

    def blocks(self, file: SourceFile) -> Iterator[bytes]:
        """The bytes of a file of the source, in blocks."""

    def cancel(self) -> None:
        """Make waiting reads fail soon."""

    def close(self) -> None:
        """Close all files and connections."""


def read(reader: Reader, source: Copy, offset: int = 0, nbytes: int | None = None) -> bytearray:
    """The bytes of a small range, or of a part of one: ``nbytes`` from ``offset`` on."""
    data = bytearray(source.nbytes if nbytes is None else nbytes)
    reader.fill(source, offset, memoryview(data))
    return data
