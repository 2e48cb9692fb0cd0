"""Files as verification reads them, in blocks: opened once in a directory, or by ranges where they are remote."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final, NamedTuple, Protocol

from quarkconv.defects import unreadable_file
from quarkconv.files.base import Files, Range
from quarkconv.files.open_limit import allow_open_files, hint_about_open_files
from quarkconv.files.regular import read_range
from quarkconv.files.remote import RemoteFiles

BLOCK: Final = 2 * 2**20
"""Bytes read before their checksum is computed: they are then in the CPU's cache."""


class FileReads(Protocol):
    """Files that several threads read at offsets. A context manager."""

    def __enter__(self) -> FileReads: ...

    def __exit__(self, *_: object) -> None: ...

    @property
    def block(self) -> int:
        """Bytes that are best read at a time."""

    def read(self, file: str, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends.

        Raises:
            SourceError: the file cannot be opened, or the store does not send it.
            OSError: the disk cannot be read; it names the file.
        """

    def read_into(self, file: str, view: memoryview, start: int) -> int:
        """Fill memory with the bytes from an offset on, and return how many were read; errors as of :meth:`read`."""

    def close(self) -> None:
        """Close all of them."""


class OpenFile(NamedTuple):
    """One of several files."""

    files: FileReads
    name: str

    def read(self, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends."""
        return self.files.read(self.name, start, nbytes)

    def read_into(self, view: memoryview, start: int) -> int:
        """Fill memory with the bytes from an offset on, and return how many were read."""
        return self.files.read_into(self.name, view, start)


def open_files(files: Files) -> FileReads:
    """The files of a model, for reading."""
    return RemoteReads(files) if isinstance(files, RemoteFiles) else OpenFiles(files.root)


class RemoteReads:
    """Remote files; each read is a request."""

    block: Final = 8 * 2**20

    def __init__(self, files: RemoteFiles) -> None:
        self._files = files

    def __enter__(self) -> RemoteReads:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Do nothing."""

    def read(self, file: str, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends."""
        end = min(start + nbytes, self._files.size(file) or 0)
        return bytes(self._files.fetch(Range(file, start, end))) if start < end else b""

    def read_into(self, file: str, view: memoryview, start: int) -> int:
        """Fill memory with the bytes from an offset on, and return how many were read."""
        data = self.read(file, start, len(view))
        view[: len(data)] = data
        return len(data)


class OpenFiles:
    """Files of a folder, each opened on first use, by any thread. A context manager.

    Args:
        root: the folder.
        flags: flags of ``open``, beside those for reading.
    """

    block: Final = BLOCK

    def __init__(self, root: Path, flags: int = 0) -> None:
        self._root = root
        self._flags = os.O_RDONLY | os.O_CLOEXEC | flags
        self._descriptors: dict[str, int] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> OpenFiles:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close all of them."""
        for descriptor in self._descriptors.values():
            os.close(descriptor)
        self._descriptors.clear()

    def read(self, file: str, start: int, nbytes: int) -> bytes:
        """A byte range; shorter where the file ends."""
        descriptor = self[file]
        try:
            return read_range(descriptor, start, nbytes)
        except OSError as error:
            error.filename = str(self._root / file)
            raise

    def read_into(self, file: str, view: memoryview, start: int) -> int:
        """Fill memory with the bytes from an offset on, and return how many were read."""
        descriptor = self[file]
        try:
            return os.preadv(descriptor, [view], start)
        except OSError as error:
            error.filename = str(self._root / file)
            raise

    def __getitem__(self, file: str) -> int:
        """The descriptor of a file.

        Raises:
            SourceError: it cannot be opened.
        """
        with self._lock:
            if file not in self._descriptors:
                try:
                    descriptor = os.open(self._root / file, self._flags)
                except OSError as error:
                    path, hint = str(self._root / file), hint_about_open_files(error)
                    raise unreadable_file(path, error.strerror, hint=hint) from error
                self._descriptors[file] = descriptor
                allow_open_files(descriptor)  # the lowest number that was free: so many are open
            return self._descriptors[file]
