"""Opening the files of an untrusted directory: regular files inside it, and nothing else.

A name may be a pipe that never delivers, a device that never ends, or a link to a private key, which a conversion would
copy into a directory that is then published.
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Final

CHECK_ACCESS: Final = "check its permissions"
"""The hint where a permission is missing."""
LFS_POINTER: Final = b"version https://git-lfs"
"""Start of a file that Git LFS has not fetched."""
FETCH_POINTER: Final = "run `git lfs pull` in the model's directory, or download the model with `hf download`"
"""The hint for such a file."""

_KINDS: Final = {
    stat.S_IFDIR: "a directory",
    stat.S_IFIFO: "a pipe",
    stat.S_IFSOCK: "a socket",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
}
_SNAPSHOTS, _BLOBS = "snapshots", "blobs"
_BLOB: Final = re.compile(r".*/(?:models--[^/]+/blobs/[0-9a-f]{40,64}|blobs/([0-9a-f]{2})/\1[0-9a-f]{62})", re.DOTALL)
"""A blob in the Hub's cache: of one repo or, from Xet storage, shared. Its name is the hash of its content, so that a
link to it reveals nothing that its author does not know."""


def open_regular(path: str | os.PathLike[str]) -> int:
    """Open a regular file for reading, without blocking, and return its descriptor.

    Raises:
        OSError: it cannot be opened, or is not a regular file.
        ValueError: the name is not valid.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY)
    try:
        mode = os.fstat(descriptor).st_mode
        if not stat.S_ISREG(mode):
            raise OSError(errno.EINVAL, _KINDS.get(stat.S_IFMT(mode), "not a regular file"), os.fspath(path))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def read_range(descriptor: int, start: int, nbytes: int) -> bytes:
    """A byte range of an open file; shorter only where the file ends.

    One call of the system may return less: at most 2 GiB, and over FUSE as much as arrived.
    """
    data = os.pread(descriptor, nbytes, start)
    if len(data) in (0, nbytes):
        return data
    parts, done = [data], len(data)
    while done < nbytes and (data := os.pread(descriptor, nbytes - done, start + done)):
        parts.append(data)
        done += len(data)
    return b"".join(parts)


def read_regular(path: str | os.PathLike[str], limit: int) -> bytes | int:
    """The bytes of a regular file; if there are more than ``limit``, its size instead.

    Raises:
        OSError: it cannot be read, or is not a regular file.
    """
    with open(open_regular(path), "rb") as handle:
        size = os.fstat(handle.fileno()).st_size
        if size > limit:
            return size
        data = handle.read(limit + 1)  # it may have grown, and the kernel reports size 0 for its own files
    return data if len(data) <= limit else len(data)


def leads_outside(root: Path, name: str | os.PathLike[str]) -> str | None:
    """The target of a name in a directory, if it lies outside of the directory; else None.

    Blobs of the Hub's cache count as inside: snapshots and some downloads consist of links to them.

    Args:
        root: the directory.
        name: a path relative to it.
    """
    path = root / name
    parts = [name, *list(Path(name).parents)[:-1]]
    try:
        if not any(os.path.islink(os.path.join(root, part)) for part in parts) or not path.exists():
            return None
        real, inside = Path(os.path.realpath(path)), Path(os.path.realpath(root))
    except (OSError, ValueError):  # opening the file reports the error
        return None
    if real.is_relative_to(inside) or _BLOB.fullmatch(str(real)):
        return None
    repo = next((parent.parent for parent in inside.parents if parent.name == _SNAPSHOTS), None)
    if repo is not None and real.is_relative_to(repo / _BLOBS):
        return None
    return str(real)


def walk(root: Path, *, hidden: bool = True) -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Everything below a directory as (relative path, entry), unsorted; links are not followed.

    Skips folders that cannot be read and, unless ``hidden``, those whose names start with a dot. Folders may be nested
    to any depth.
    """
    folders = [""]
    while folders:
        folder = folders.pop()
        try:
            with os.scandir(os.path.join(root, folder)) as entries:
                for entry in entries:
                    name = os.path.join(folder, entry.name)
                    if entry.is_dir(follow_symlinks=False) and (hidden or not entry.name.startswith(".")):
                        folders.append(name)
                    yield name, entry
        except OSError:
            continue
