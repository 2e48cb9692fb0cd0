"""The files of one remote model behind HTTP, as :class:`quarkconv.files.base.Files`."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from quarkconv.files.base import Range
from quarkconv.files.http_ranges import HttpRanges
from quarkconv.files.remote import Entry, RemoteFiles


class HttpFiles(RemoteFiles):
    """Files that one :class:`HttpRanges` reads, which also names the model.

    Args:
        ranges: reads their ranges.
        entries: the files by their relative names.
    """

    def __init__(self, ranges: HttpRanges, entries: Mapping[str, Entry]) -> None:
        super().__init__(entries)
        self._ranges = ranges

    def __str__(self) -> str:
        return str(self._ranges)

    def fetch(self, requested: Range) -> bytes:
        """The bytes of a range that lies inside its file; a broken transfer resumes where it broke.

        Raises:
            SourceError: the service does not send them, or sends something else.
        """
        return self._ranges.fetch(requested)

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Locate some files again, which compares size and hash with the listing.

        Raises:
            SourceError: the hash or size of one has changed, or it is gone.
        """
        for _ in self.pool.map(self._ranges.locate, names):
            pass

    def traffic(self) -> tuple[int, int]:
        """Bytes read, and requests made."""
        return self._ranges.nbytes, self._ranges.requests
