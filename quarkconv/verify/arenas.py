"""Host memory for one layer's codes, used again for layer after layer.

For a GPU the memory is page-locked, so that the device copies from it by itself while the next layer is read.
"""

from __future__ import annotations

import mmap
import queue
import threading
from types import TracebackType
from typing import Any

import torch
from torch import Tensor


class Arena:
    """Memory that starts on a page.

    Args:
        nbytes: its size.
        pinned: whether to lock its pages for a GPU.

    Attributes:
        memory: the memory as bytes.
        tensor: the same as uint8 [nbytes].
    """

    def __init__(self, nbytes: int, *, pinned: bool) -> None:
        self.memory = memoryview(mmap.mmap(-1, max(nbytes, 1)))
        self.tensor: Tensor = torch.frombuffer(self.memory, dtype=torch.uint8)
        self._pinned = False
        if pinned:  # not torch's own pinned memory: that is rounded up to a power of two
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            status = runtime.cudaHostRegister(self.tensor.data_ptr(), self.tensor.nbytes, 0)
            self._pinned = int(status) == 0

    def close(self) -> None:
        """Unlock the pages; the memory goes when nothing refers to it any more."""
        if self._pinned:
            runtime: Any = torch.cuda.cudart()  # type: ignore[no-untyped-call]
            runtime.cudaHostUnregister(self.tensor.data_ptr())
            self._pinned = False


class ArenaPool:
    """A few arenas of one size, handed out and taken back; a context manager that makes and closes them.

    A thread makes one after the other, since locking pages takes about as long as reading into them: while the first
    one is filled, the others are made.

    Args:
        count: how many there are.
        nbytes: size of each.
        pinned: whether their pages are locked.
    """

    def __init__(self, count: int, nbytes: int, *, pinned: bool) -> None:
        self._count = count
        self._nbytes = nbytes
        self._pinned = pinned
        self._made: list[Arena] = []
        self._free: queue.SimpleQueue[Arena | Exception] = queue.SimpleQueue()
        self._closing = threading.Event()
        self._maker = threading.Thread(target=self._make, name="quarkconv-arenas")

    def __enter__(self) -> ArenaPool:
        self._maker.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._closing.set()
        self._maker.join()
        for arena in self._made:
            arena.close()

    def _make(self) -> None:
        try:
            while len(self._made) < self._count and not self._closing.is_set():
                self._made.append(Arena(self._nbytes, pinned=self._pinned))
                self._free.put(self._made[-1])
        except Exception as error:
            self._free.put(error)

    def take(self, timeout: float) -> Arena | None:
        """An arena that nobody uses; None when there is none for ``timeout`` seconds.

        Raises:
            OSError: there is no memory for it.
        """
        try:
            found = self._free.get(timeout=timeout)
        except queue.Empty:
            return None
        if isinstance(found, Exception):
            self._free.put(found)  # for whoever asks next
            raise found
        return found

    def give_back(self, arena: Arena) -> None:
        """Let others use an arena."""
        self._free.put(arena)
