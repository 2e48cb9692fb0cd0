"""Where the bytes of a checkpoint come from: files of a directory, or of a repo on the Hub."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple, Protocol


class Range(NamedTuple):
    """The bytes of a file from ``start`` up to ``end``."""

    file: str
    start: int
    end: int


class Files(Protocol):
    """The files of one model, by their names inside it. They are only ever read."""

    @property
    def root(self) -> Path:
        """The directory; of what is not on disk, its name, for people only."""

    def path(self, name: str) -> Path | None:
        """Where a file is on disk; None when it is not."""

    def names(self) -> Iterator[Path]:
        """Every file that lies in no hidden folder, relative to the root, in the order of names."""

    def size(self, name: str) -> int | None:
        """Size in bytes; None where there is no such file."""

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends."""

    def read_many(self, ranges: Iterable[Range]) -> Iterator[bytes]:
        """Byte ranges one after the other, read ahead where that helps."""

    def expect(self, sizes: Mapping[str, int], arrived: Callable[[str], None]) -> None:
        """Say that so many bytes from the beginning of some files are going to be read.

        Args:
            sizes: name -> bytes.
            arrived: called with the name of each file whose bytes had to be fetched, when they are there.
        """


def in_hidden_folder(relative: Path) -> bool:
    """Whether a file lies in a folder whose name starts with a dot, such as ``.git`` or ``.cache``."""
    return any(part.startswith(".") for part in relative.parts[:-1])
