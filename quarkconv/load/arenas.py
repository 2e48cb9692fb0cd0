"""Memory that layers are read into; that for the codes of one layer is reused for every layer.

For a GPU the memory is page-locked, so that the device copies from it while the next layer is read. It is locked after
the first layer has been read into it: pinning untouched memory faults its pages in serially, readers do it in parallel.
"""

from __future__ import annotations

import mmap
import queue
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Any, Protocol

import torch
from torch import Tensor


class Memory(Protocol):
    """Memory that files are read into.

    Attributes:
        tensor: the memory as uint8 [nbytes].
    """

    tensor: Tensor

    @property
    def block(self) -> int:
        """Bytes that it takes at a time, at most."""

    def fill(self, at: int, nbytes: int, read: Callable[[memoryview], int]) -> int:
        """Fill bytes from ``at`` on with ``read``, and return how many it read; any thread may do so."""

    def finish(self) -> None:
        """Wait until all reads are in ``tensor``."""


class HostMemory:
    """Memory of the host.

    Args:
        memory: the bytes.

    Attributes:
        memory: the bytes.
        tensor: the same as uint8 [nbytes].
    """

    block: int = sys.maxsize

    def __init__(self, memory: memoryview) -> None:
        self.memory = memory
        self.tensor: Tensor = torch.frombuffer(memory, dtype=torch.uint8)

    def fill(self, at: int, nbytes: int, read: Callable[[memoryview], int]) -> int:
        """Fill bytes from ``at`` on with ``read``, and return how many it read."""
        return read(self.memory[at : at + nbytes])

    def finish(self) -> None:
        """Do nothing: reads go to the memory directly."""


class Arena(HostMemory):
    """Memory that starts on a page.

    Args:
        nbytes: its size.
    """

    def __init__(self, nbytes: int) -> None:
        super().__init__(memoryview(mmap.mmap(-1, max(nbytes, 1))))
        self._tried = self._pinned = False

    def lock(self) -> None:
        """Lock the pages for GPUs, if they are not; where that fails, copies from them take longer."""
        if not self._tried:  # not torch's own pinned memory: that is rounded up to a power of two
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            status = runtime.cudaHostRegister(self.tensor.data_ptr(), self.tensor.nbytes, 0)
            self._tried, self._pinned = True, int(status) == 0

    def close(self) -> None:
        """Unlock the pages; the memory goes when nothing refers to it any more."""
        if self._pinned:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(self.tensor.data_ptr())
            self._pinned = False


class ArenaPool:
    """A few arenas of one size, handed out and taken back; a context manager that closes them.

    Args:
        count: how many there are at most; each is made when it is first needed.
        nbytes: size of each.
    """

    def __init__(self, count: int, nbytes: int) -> None:
        self._nbytes = nbytes
        self._arenas: list[Arena] = []
        self._free: queue.SimpleQueue[Arena | None] = queue.SimpleQueue()
        for _ in range(count):
            self._free.put(None)

    def __enter__(self) -> ArenaPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for arena in self._arenas:
            arena.close()

    def take(self, timeout: float) -> Arena | None:
        """A free arena; None after ``timeout`` seconds without one."""
        try:
            arena = self._free.get(timeout=timeout)
        except queue.Empty:
            return None
        if arena is None:
            arena = Arena(self._nbytes)
            self._arenas.append(arena)
        return arena

    def give_back(self, arena: Arena) -> None:
        """Let others use an arena."""
        self._free.put(arena)
