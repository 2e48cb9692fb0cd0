"""Byte ranges of a checkpoint's files -> memory, in blocks, with checksums on the way."""

from __future__ import annotations

import errno
import os
from typing import Final

import xxhash

from quarkconv.defects import unreadable_tensor
from quarkconv.errors import SourceError
from quarkconv.files.base import Files
from quarkconv.files.page_cache import in_page_cache
from quarkconv.load.arenas import Memory
from quarkconv.load.layer_reads import LayerRead
from quarkconv.load.open_files import OpenFiles, open_files
from quarkconv.plan.shards import PAGE

_DIRECT: Final = getattr(os, "O_DIRECT", 0)


class RangeReader:
    """Reads byte ranges; several threads may read at a time.

    Args:
        store: the files of a checkpoint.
    """

    def __init__(self, store: Files) -> None:
        self._root = store.root
        self._files = open_files(store)
        self._direct = OpenFiles(store.root, _DIRECT) if isinstance(self._files, OpenFiles) else None
        self._without_direct: set[str] = set()

    def close(self) -> None:
        """Close the files."""
        self._files.close()
        if self._direct is not None:
            self._direct.close()

    def fill(self, item: LayerRead, memory: Memory, *, on_page: bool = False) -> bool:
        """Read one range to its place in memory, which may start on a page.

        Returns:
            False when the range has another checksum than the manifest.

        Raises:
            SourceError: the file cannot be read, or ends before the range does.
        """
        hasher = xxhash.xxh3_128() if item.checksum else None
        done = 0

        def read(view: memoryview) -> int:
            try:
                count = (
                    self._read_block(item, view, done)
                    if on_page
                    else self._files.read_into(item.file, view, item.start + done)
                )
            except OSError as error:
                raise unreadable_tensor(self._path(item), item.tensor, error.strerror or str(error)) from error
            if count == 0:
                raise unreadable_tensor(self._path(item), item.tensor, f"the file ends at {item.start + done}")
            if hasher is not None:
                hasher.update(view[:count])
            return count

        while done < item.nbytes:
            done += memory.fill(item.at + done, min(self._files.block, memory.block, item.nbytes - done), read)
        return hasher is None or hasher.hexdigest() == item.checksum

    def _path(self, item: LayerRead) -> str:
        return f"{self._root}/{item.file}"

    def _read_block(self, item: LayerRead, view: memoryview, done: int) -> int:
        """Read a block: from the page cache where it is there, else past it where it lies on pages."""
        start = item.start + done
        on_pages = not ((item.at + done) % PAGE or start % PAGE or len(view) % PAGE)
        direct = self._direct_descriptor(item.file) if on_pages else None
        if direct is not None and not self._is_cached(item.file, start, len(view)):
            try:
                return os.preadv(direct, [view], start)
            except OSError as error:
                if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL):
                    raise
        return self._files.read_into(item.file, view, start)

    def _is_cached(self, file: str, start: int, nbytes: int) -> bool:
        return isinstance(self._files, OpenFiles) and in_page_cache(self._files[file], start, nbytes)

    def _direct_descriptor(self, file: str) -> int | None:
        """The file opened for reads past the page cache; None where the system does not do that."""
        if not _DIRECT or self._direct is None or file in self._without_direct:
            return None
        try:
            return self._direct[file]
        except SourceError:
            self._without_direct.add(file)
            return None
