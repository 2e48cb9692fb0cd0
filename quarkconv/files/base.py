"""The files of a checkpoint, wherever they are: in a directory, or on the Hub."""

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
    """The files of one model by their relative names; they are only read."""

    @property
    def root(self) -> Path:
        """The directory; of remote files, their origin for messages."""

    def path(self, name: str) -> Path | None:
        """The path of a file on disk; None if it is remote."""

    def names(self) -> Iterator[Path]:
        """Every file outside of hidden folders, relative to the root, sorted."""

    def size(self, name: str) -> int | None:
        """Size in bytes; None if the file does not exist."""

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends."""

    def read_many(self, ranges: Iterable[Range]) -> Iterator[bytes]:
        """Byte ranges one after the other; remote ones are read ahead."""

    def expect(self, sizes: Mapping[str, int], arrived: Callable[[str], None]) -> None:
        """Announce that the beginnings of some files will be read.

        Args:
            sizes: name -> bytes.
            arrived: called with the name of each file whose bytes have been fetched.
        """


def in_hidden_folder(relative: Path) -> bool:
    """Whether a file lies in a folder whose name starts with a dot, such as ``.git`` or ``.cache``."""
    return any(part.startswith(".") for part in relative.parts[:-1])


def is_inside(name: str) -> bool:
    """Whether a name is a plain relative path: a conversion creates files of the same names."""
    return all(part not in ("", ".", "..") for part in name.split("/")) and "\0" not in name and "\\" not in name
