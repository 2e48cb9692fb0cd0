"""Files that are read by byte ranges over a network: what the Hub and object stores have in common."""

from __future__ import annotations

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path, PosixPath, PurePosixPath
from typing import Final

from quarkconv.files.base import Range, in_hidden_folder
from quarkconv.files.read_ahead import Pace, read_ahead

CONNECTIONS: Final = 16
"""Concurrent requests."""

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Entry:
    """A remote file as it was listed: its size in bytes, and its ETag."""

    size: int
    etag: str


class _Origin(PosixPath):
    """The name of a remote model as a path: a path would make one slash of the two of its scheme."""

    def __str__(self) -> str:
        return super().__str__().replace(":/", "://", 1)


class RemoteFiles(ABC):
    """The files of one remote model, as :class:`quarkconv.files.base.Files`. Nothing is stored on disk.

    Subclasses fetch ranges, check ETags, and name the model with ``__str__``.

    Args:
        entries: the files by their relative names.
    """

    ahead_bytes: int | None = None
    """Bytes that one reader requests before they are needed; None for the default."""
    pins_etags: bool = False
    """Whether each response is compared with the listed ETag: a file that was read need not be checked again."""

    def __init__(self, entries: Mapping[str, Entry]) -> None:
        self.entries: Final = dict(entries)
        self._heads: dict[str, bytes] = {}
        self.pace = Pace()
        self.pool = ThreadPoolExecutor(max_workers=CONNECTIONS, thread_name_prefix="quarkconv-remote")

    @property
    def root(self) -> Path:
        """The name of the model, for messages."""
        return _Origin(str(self))

    def path(self, name: str) -> None:  # noqa: ARG002
        """None: nothing is on disk."""
        return

    def names(self) -> Iterator[Path]:
        """Every file outside of hidden folders, in the order of :class:`quarkconv.files.local.LocalFiles`."""
        for path in sorted(Path(PurePosixPath(name)) for name in self.entries):
            if not in_hidden_folder(path):
                yield path

    def size(self, name: str) -> int | None:
        """Size in bytes; None if the file does not exist."""
        entry = self.entries.get(name)
        return None if entry is None else entry.size

    def etag(self, name: str) -> str:
        """The ETag of a file as it was listed."""
        return self.entries[name].etag

    def read(self, name: str, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends.

        Raises:
            SourceError: the server does not send it, or sends something else.
        """
        end = min(start + nbytes, self.entries[name].size)
        head = self._heads.get(name, b"")
        if end <= len(head):
            return head[start:end]
        return bytes(self.fetch(Range(name, start, end)))

    def read_many(self, ranges: Iterable[Range]) -> Iterator[bytes]:
        """Byte ranges one after the other, fetched ahead over several connections."""
        return read_ahead(ranges, self.fetch, self.pool, self.pace)

    def expect(self, sizes: Mapping[str, int], arrived: Callable[[str], None]) -> None:
        """Fetch the beginnings of some files concurrently, and keep them for :meth:`read`."""
        ends = {
            name: min(size, self.entries[name].size)
            for name, size in sizes.items()
            if name in self.entries and size > len(self._heads.get(name, b""))
        }

        def rest(name: str) -> bytes:
            head = self._heads.get(name, b"")
            return head + self.fetch(Range(name, len(head), ends[name]))

        futures = {self.pool.submit(rest, name): name for name in ends}
        try:
            for future in as_completed(futures):
                self._heads[futures[future]] = future.result()
                arrived(futures[future])
        except BaseException:
            for future in futures:
                future.cancel()
            raise
        if ends:
            nbytes, requests = self.traffic()
            _log.info("%s: %d bytes read in %d requests", self, nbytes, requests)

    def forget(self) -> None:
        """Free the beginnings that are kept; they are fetched again when they are read."""
        self._heads.clear()

    @abstractmethod
    def fetch(self, requested: Range) -> bytes | memoryview:
        """The bytes of a range that lies inside its file.

        Raises:
            SourceError: the server does not send them, or sends something else.
        """

    @abstractmethod
    def check_unchanged(self, names: Iterable[str]) -> None:
        """Check the ETags of some files again.

        Raises:
            SourceError: the ETag or size of one has changed, or it is gone.
        """

    @abstractmethod
    def traffic(self) -> tuple[int, int]:
        """Bytes read, and requests made."""

    def close(self) -> None:
        """Cancel pending requests."""
        self.pool.shutdown(wait=False, cancel_futures=True)
