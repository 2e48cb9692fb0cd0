"""Whether a part of a file is in the page cache, without reading it.

A read with RWF_NOWAIT would show that too, but it triggers readahead, so that a following O_DIRECT read fetches the
same blocks twice.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from functools import cache
from typing import Any, Final

_CACHESTAT: Final = 451  # its number on every architecture but alpha; Linux 6.5, include/uapi/linux/mman.h


class _Range(ctypes.Structure):
    _fields_ = (("off", ctypes.c_uint64), ("len", ctypes.c_uint64))


class _Stat(ctypes.Structure):
    _fields_ = tuple(
        (name, ctypes.c_uint64) for name in ("cached", "dirty", "writeback", "evicted", "recently_evicted")
    )


def in_page_cache(descriptor: int, start: int, nbytes: int) -> bool:
    """Whether all of a range is in the page cache.

    True where the system does not report it: before Linux 6.5, and for files without write permission. The result
    affects speed only.

    Args:
        descriptor: of the file, open for reading.
        start: first byte, a multiple of the page size.
        nbytes: size of the range.
    """
    libc = _libc()
    if libc is None or nbytes == 0:
        return True
    found = _Stat()
    requested = _Range(start, nbytes)
    if libc.syscall(_CACHESTAT, descriptor, ctypes.byref(requested), ctypes.byref(found), 0):
        return True
    return int(found.cached) >= -(-nbytes // mmap.PAGESIZE)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
