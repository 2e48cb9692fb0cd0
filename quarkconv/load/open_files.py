"""Files as verification reads them: opened once, in blocks."""

from __future__ import annotations

import os
import threading
from pathlib import Path
from typing import Final

from quarkconv.errors import SourceError
from quarkconv.files.open_limit import allow_open_files, hint_about_open_files

BLOCK: Final = 2 * 2**20
"""Bytes that are read before their checksum is computed: they are in the processor's cache then."""


class OpenFiles:
    """Files of a folder, each opened for reading when it is first asked for, by any thread. A context manager.

    Args:
        root: the folder.
        flags: of the opening, beside those for reading.
    """

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
                    raise SourceError(
                        "A tensor cannot be read", code="shard-missing", file=str(self._root / file),
                        found=error.strerror, hint=hint_about_open_files(error),
                    ) from error  # fmt: skip
                self._descriptors[file] = descriptor
                allow_open_files(descriptor)  # the lowest number that was free: so many are open
            return self._descriptors[file]
