"""Writing small files and directories durably, and the error when that fails."""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from quarkconv.errors import WriteError

FULL: Final = (errno.ENOSPC, errno.EDQUOT)
"""Error numbers of a full disk or quota."""
_REFUSED: Final = (errno.EROFS, errno.EACCES, errno.EPERM)
"""Error numbers of a file system that is read-only, or of another owner's directory."""


def part_of(path: Path, worker: str = "") -> Path:
    """The name that a small file has until it is complete; each of several workers that write it has its own."""
    return path.with_name(f"{path.name}{worker}.part")


def write_durably(path: Path, data: bytes, worker: str = "") -> None:
    """Write a small file: after a crash it is complete under its name, or absent.

    Args:
        path: the file.
        data: its contents.
        worker: name of one of several workers that may write the same file at the same time.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = part_of(path, worker)
    write_and_sync(part, data)
    os.replace(part, path)
    sync_directory(path.parent)


def write_and_sync(path: Path, data: bytes) -> None:
    """Write a small file and flush its contents to the disk."""
    with open(path, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def folders_of(names: list[str]) -> list[str]:
    """The folders of files, as relative paths, inner ones first; the root, ``.``, is last."""
    found = {folder.as_posix() for name in names for folder in Path(name).parents} | {"."}
    return sorted(found, key=lambda folder: (-len(Path(folder).parts), folder))


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError into a WriteError about ``path``. Errors of reading the source are SourceErrors already."""
    try:
        yield
    except OSError as error:
        raise as_write_error(error, path) from error


def as_write_error(error: OSError, path: Path) -> WriteError:
    """The error for a failure to write below ``path``."""
    message, hint = "Writing failed", "fix the cause, then run the same command again: it resumes where it stopped"
    if error.errno in FULL:
        message = "The disk is full" if error.errno == errno.ENOSPC else "The disk quota is used up"
        hint = "nothing is lost: free space, then run the same command again; it resumes where it stopped"
    elif error.errno in _REFUSED:
        hint = "make it writable, or give another directory with --out, then run the command again"
    elif error.errno == errno.ENAMETOOLONG:
        hint = "give a shorter --out"
    found = error.strerror or str(error)
    return WriteError(message, file=os.fsdecode(error.filename or path), found=found, hint=hint)
