"""Whether a part of a file is in memory already, asked without reading any of it.

A read that must not wait (RWF_NOWAIT) would tell as well, but it makes the kernel begin to read ahead what it does not
have: who then reads past the page cache has much of it read twice.
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

    Where the system does not tell it is taken to be: before Linux 6.5, and of files that the caller could not write to.
    Nothing but speed depends on the answer.

    Args:
        descriptor: of the file, open for reading.
        start: first byte, a multiple of the page size.
        nbytes: size of the range.
    """
    libc = _libc()
    if libc is None or nbytes == 0:
        return True
    found = _Stat()
    asked = _Range(start, nbytes)
    if libc.syscall(_CACHESTAT, descriptor, ctypes.byref(asked), ctypes.byref(found), 0):
        return True
    return int(found.cached) >= -(-nbytes // mmap.PAGESIZE)


@cache
def _libc() -> Any:
    return ctypes.CDLL(None) if sys.platform == "linux" else None
