"""Output files, written at offsets by several threads, past the page cache where the file system allows it.

A conversion writes as much as the machine has memory, or more, and never reads it again. The page cache would copy
every byte once more and evict the source. Direct I/O (``O_DIRECT``) sends a buffer to the device as it is; buffer,
offset and length must then be multiples of the device's block, and a page is one on every device.

The space of a file is reserved before the first write (fallocate): a full disk is detected at once, and threads that
write to one file do not wait for one another, as they would if each write extended it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import logging
import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final

from quarkconv.plan.shards import PAGE
from quarkconv.write.destination import ShardFile
from quarkconv.write.durable import FULL

_DIRECT: Final = getattr(os, "O_DIRECT", 0)
_REFUSED: Final = (errno.EINVAL, errno.EOPNOTSUPP)
_log: Final = logging.getLogger(__name__)


class DirectWrites:
    """Whether the files of one conversion are written past the page cache; shared by them, since they lie together."""

    def __init__(self) -> None:
        self.enabled = _DIRECT != 0

    def refused(self, path: Path, reason: str) -> None:
        """The file system refuses direct writes: continue without them, and log it once."""
        if self.enabled:
            self.enabled = False
            _log.info("direct writes fail in %s (%s): writing through the page cache", path.parent, reason)


def aligned_buffer(nbytes: int) -> memoryview:
    """Memory that starts on a page."""
    return memoryview(mmap.mmap(-1, nbytes))


class OutputFile:
    """A new file that several threads write blocks to, and that is then sealed at its length.

    Args:
        path: the file; created, or emptied.
        nbytes: its final length.
        direct: whether to write past the page cache.
        locked: whether to lock the file, so that others see that its writer lives.
    """

    in_order: Final = False

    def __init__(self, path: Path, nbytes: int, direct: DirectWrites, *, locked: bool = False) -> None:
        self.path = path
        self.nbytes = nbytes
        self._direct = direct
        self._descriptor = self._open()
        try:
            if locked:
                fcntl.flock(self._descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _reserve(self._descriptor, -(-nbytes // PAGE) * PAGE)
        except BaseException:
            self.close()
            raise

    def write(self, block: memoryview, offset: int) -> None:
        """Write a block at an offset: page-aligned memory, and whole pages at a page.

        Raises:
            OSError: writing failed.
        """
        while block:
            was_direct = self._is_direct()  # another thread may change it meanwhile
            try:
                written = os.pwrite(self._descriptor, block, offset)
            except OSError as error:
                if error.errno not in _REFUSED or not was_direct:
                    error.filename = str(self.path)
                    raise
                self._direct.refused(self.path, os.strerror(error.errno))
                self._through_page_cache()
                continue
            block, offset = block[written:], offset + written
            if block and written % PAGE:  # a short write, as on a full disk: the rest does not start on a page
                self._through_page_cache()

    def flush(self) -> None:
        """Flush the page cache to the disk, so that sealing takes short."""
        if not self._is_direct():
            os.fdatasync(self._descriptor)

    def seal(self) -> None:
        """Cut off the padding of the last block, make the file durable, and close it."""
        os.ftruncate(self._descriptor, self.nbytes)
        os.fsync(self._descriptor)
        self._close()

    def close(self) -> None:
        """Remove the file unless it is sealed."""
        if self._descriptor >= 0:
            with suppress(OSError):
                self.path.unlink()
            self._close()

    def _close(self) -> None:
        descriptor, self._descriptor = self._descriptor, -1
        os.close(descriptor)

    def _open(self) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        if self._direct.enabled:
            try:
                return os.open(self.path, flags | _DIRECT, 0o666)
            except OSError as error:
                if error.errno not in _REFUSED:
                    raise
                self._direct.refused(self.path, os.strerror(error.errno))
        return os.open(self.path, flags, 0o666)

    def _is_direct(self) -> bool:
        return bool(fcntl.fcntl(self._descriptor, fcntl.F_GETFL) & _DIRECT)

    def _through_page_cache(self) -> None:
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~_DIRECT)


def _reserve(descriptor: int, nbytes: int) -> None:
    """Reserve the space of a file where the file system supports it.

    This is fallocate(2) itself: without support, os.posix_fallocate would write to every block.

    Raises:
        OSError: the disk is full.
    """
    fallocate = _fallocate()
    while fallocate is not None and nbytes and fallocate(descriptor, 0, 0, nbytes):
        number = ctypes.get_errno()
        if number in FULL:
            raise OSError(number, os.strerror(number))
        if number != errno.EINTR:  # not supported
            return


@cache
def _fallocate() -> Callable[[int, int, int, int], int] | None:
    """fallocate of the C library, if any."""
    library = ctypes.CDLL(None, use_errno=True)
    function = getattr(library, "fallocate64", None) or getattr(library, "fallocate", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_int64, ctypes.c_int64)
        function.restype = ctypes.c_int
    return function


class BlockStream:
    """Bytes gathered in a buffer and written to a file in blocks as long as the buffer.

    Args:
        file: the file.
        buffer: page-aligned memory of whole pages.
        offset: where in the file the stream starts; a multiple of a page.
        wrote: called after each block with the number of bytes of the stream in it.
    """

    def __init__(self, file: ShardFile, buffer: memoryview, offset: int, wrote: Callable[[int], None]) -> None:
        self._file = file
        self._buffer = buffer
        self._offset = offset
        self._wrote = wrote
        self._filled = 0

    def room(self) -> memoryview:
        """Memory for the next bytes; never empty. Report with :meth:`filled` how many were written to it."""
        if self._filled == len(self._buffer):
            self._write(len(self._buffer))
        return self._buffer[self._filled :]

    def filled(self, nbytes: int) -> None:
        """The first ``nbytes`` of the room now hold bytes of the stream."""
        self._filled += nbytes

    def put(self, data: memoryview) -> None:
        """Append bytes that are in memory already."""
        while data:
            room = self.room()
            count = min(len(room), len(data))
            room[:count] = data[:count]
            self.filled(count)
            data = data[count:]

    def finish(self) -> None:
        """Write the rest, padded with zeros to a whole page."""
        end = -(-self._filled // PAGE) * PAGE
        self._buffer[self._filled : end] = bytes(end - self._filled)
        self._write(end)
        self._file.flush()

    def _write(self, count: int) -> None:
        self._file.write(self._buffer[:count], self._offset)
        self._offset += count
        filled, self._filled = self._filled, 0
        self._wrote(filled)
