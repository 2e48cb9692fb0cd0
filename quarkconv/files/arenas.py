"""The memory that glibc keeps for the threads of a process."""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from functools import cache
from typing import Final

_M_ARENA_MAX: Final = -8
"""Of mallopt(3)."""
_ARENAS: Final = 4


@cache
def limit_arenas() -> None:
    """Let all threads share a few heaps, unless the user chose their number.

    Each thread of a client library has a heap of its own otherwise, which keeps what was freed: 60 MB more for a
    conversion between object stores, of 237.
    """
    if "MALLOC_ARENA_MAX" not in os.environ:
        with suppress(AttributeError, OSError):  # another C library
            ctypes.CDLL(None).mallopt(_M_ARENA_MAX, _ARENAS)


def trim_heaps() -> None:
    """Give the memory that was freed back to the system; glibc keeps it otherwise.

    After the headers of 142,000 tensors are parsed and a conversion of them is planned, that is 40 MB of 167.
    """
    with suppress(AttributeError, OSError):  # another C library
        ctypes.CDLL(None).malloc_trim(0)
