"""The locks of a working folder. They end with their processes, however those end."""

from __future__ import annotations

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Final

from quarkconv.errors import WriteError

LOCK_NAME: Final = "lock"


class OutputBusyError(WriteError):
    """Another process works on the output."""


class OutputFinishingError(OutputBusyError):
    """Another process has the output of this conversion alone: it finishes, or does all that is left."""


def lock_folder(folder: Path) -> tuple[int, bool]:
    """Lock a working folder, created if necessary, for one process.

    Returns:
        The descriptor that holds the lock, and whether the folder is new.

    Raises:
        OutputBusyError: another process holds the lock.
    """
    path = folder / LOCK_NAME
    while True:
        try:
            folder.mkdir()
            created = True
        except FileExistsError:
            created = False
        try:
            descriptor = _open(path)
        except FileNotFoundError:  # another process has just finished here and removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return descriptor, created
        except BlockingIOError:
            owner = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise OutputBusyError(
                "Another process is converting into this directory",
                file=str(folder.parent),
                found=f"process {owner}",
                hint="wait until it finishes, or choose another --out",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the lock of a folder that is gone


def unlock_folder(folder: Path, descriptor: int) -> None:
    """Give the lock of a working folder back, and remove the folder if it is empty.

    NFS keeps a file that is open under another name until it is closed, so that its folder could not be removed before.
    """
    os.close(descriptor)
    with suppress(OSError):
        folder.rmdir()


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def hold(locks: ExitStack, path: Path, mode: int) -> None:
    """Hold the lock of a share, or that of the whole together with other shares, until ``locks`` is closed.

    Raises:
        OutputBusyError: another process holds it.
        FileNotFoundError: another process has just finished here and removed the folder.
    """
    descriptor = _open(path)
    locks.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
        if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "the lock was removed", str(path))
    except BlockingIOError:
        raise OutputBusyError(
            "Another process is working on this part, or on the whole",
            file=str(path.parent.parent),
            hint="wait until it finishes",
        ) from None


def remove_unlocked(path: Path) -> None:
    """Remove a file, unless a process has locked it."""
    with suppress(OSError):
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            path.unlink()
        finally:
            os.close(descriptor)


@contextmanager
def waiting_for(path: Path) -> Iterator[None]:
    """Hold a lock that others hold for a moment only."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
