"""The files of a directory."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path

from quarkconv.files.base import Range
from quarkconv.files.regular import open_regular, read_range, walk


class LocalFiles:
    """The files of a directory."""

    def __init__(self, root: Path) -> None:
        self._root = root

    @property
    def root(self) -> Path:
        """The directory."""
        return self._root

    def path(self, name: str) -> Path:
        """The path of a file."""
        return self._root / name

    def names(self) -> Iterator[Path]:
        """Every file outside of hidden folders, relative to the root, sorted."""
        yield from sorted(Path(name) for name, entry in walk(self._root, hidden=False) if _is_file(entry))

    def size(self, name: str) -> int | None:
        """Size in bytes; None if the file does not exist."""
        path = self.path(name)
        return path.stat().st_size if path.is_file() else None

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends.

        Raises:
            OSError: the file cannot be read.
        """
        descriptor = open_regular(self.path(name))
        try:
            return read_range(descriptor, start, nbytes)
        finally:
            os.close(descriptor)

    def read_many(self, ranges: Iterable[Range]) -> Iterator[bytes]:
        """Byte ranges one after the other; a file stays open while its ranges follow one another."""
        opened, descriptor = "", -1
        try:
            for file, start, end in ranges:
                if file != opened:
                    if descriptor >= 0:
                        os.close(descriptor)
                    opened, descriptor = file, open_regular(self.path(file))
                yield read_range(descriptor, start, end - start)
        finally:
            if descriptor >= 0:
                os.close(descriptor)

    def expect(self, sizes: Mapping[str, int], arrived: Callable[[str], None]) -> None:
        """Do nothing: a disk needs no announcement."""


def _is_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a loop of links
        return False
