"""Copying files of the source as they are."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import xxhash

from quarkconv.errors import SourceError
from quarkconv.files.regular import CHECK_ACCESS, open_regular
from quarkconv.plan.manifest import WrittenFile
from quarkconv.plan.pieces import SourceFile
from quarkconv.write.refusals import source_changed

_BLOCK: Final = 2**20
_FICLONE: Final = 0x40049409
"""Share the blocks of another file (ioctl_ficlone(2)); btrfs and XFS can, others refuse."""


def copy_file(root: Path, source: SourceFile, part: Path) -> WrittenFile:
    """Copy a file of the source, durably; where the file system can, the copy shares the blocks of the original.

    Then the checksum is that of the copy, read back: later writes to the original do not change it.

    Raises:
        OSError: writing failed.
        SourceError: the source cannot be read, or is not as long as planned.
    """
    path = root / source.name
    try:
        original = open_regular(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        with open(part, "w+b") as handle:
            cloned = _clone(original, handle.fileno())
            hasher = xxhash.xxh3_128()
            size = 0
            while block := _read(path, handle.fileno() if cloned else original):
                hasher.update(block)
                if not cloned:
                    handle.write(block)
                size += len(block)
            handle.flush()
            os.fsync(handle.fileno())
    finally:
        os.close(original)
    if size != source.size:
        raise source_changed(str(path), f"{source.size} bytes", f"{size} bytes")
    return WrittenFile(source.name, size, hasher.hexdigest())


def read_blocks(path: Path) -> Iterator[bytes]:
    """The bytes of a file of the source, in blocks.

    Raises:
        SourceError: it cannot be read.
    """
    try:
        descriptor = open_regular(path)
    except OSError as error:
        raise _unreadable(path, error) from error
    try:
        while block := _read(path, descriptor):
            yield block
    finally:
        os.close(descriptor)


def _clone(original: int, copy: int) -> bool:
    try:
        fcntl.ioctl(copy, _FICLONE, original)
    except OSError:  # a file system that cannot
        return False
    return True


def _read(path: Path, descriptor: int) -> bytes:
    try:
        return os.read(descriptor, _BLOCK)
    except OSError as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: OSError) -> SourceError:
    hint = CHECK_ACCESS if isinstance(error, PermissionError) else "check the disk, then run the same command again"
    return SourceError(
        "A source file cannot be read", code="shard-missing", file=str(path), found=error.strerror, hint=hint
    )
