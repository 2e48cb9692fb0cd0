"""What carrying out a plan needs of a source, wherever its bytes are."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from quarkconv.plan.manifest import WrittenFile
from quarkconv.plan.pieces import Piece, Plan, SourceFile
from quarkconv.write.state import FileState


class Reader(Protocol):
    """Reads pieces."""

    def read(self, piece: Piece) -> bytes:
        """The source range of a small piece."""

    def fill(self, piece: Piece, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a piece from ``offset`` on."""


class Source(Protocol):
    """The shards that a plan reads; used by several threads."""

    def check_layout(self, plan: Plan) -> None:
        """Raise if a range that the plan reads is not where its tensor lies."""

    def state(self) -> list[FileState]:
        """What tells each file from another of its name."""

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Raise if any of some files is not what it was when the conversion was begun."""

    def ahead(self, pieces: Iterable[Piece]) -> AbstractContextManager[Reader]:
        """Something to read pieces with, in the order given; it may fetch them before they are asked for."""

    def copy(self, file: SourceFile, part: Path) -> WrittenFile:
        """Copy a file of the source as it is, durably."""

    def cancel(self) -> None:
        """Let reads that wait for something fail soon."""

    def close(self) -> None:
        """Let go of everything."""
