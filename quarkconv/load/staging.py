"""Memory of a GPU that files are read into, through small page-locked buffers of the host.

A block is read into a buffer and copied to the device while the next one is read into another buffer. The host holds a
few blocks and never a layer: fresh memory costs a page fault every 4 kB, so that filling it is slower than reading.
"""

from __future__ import annotations

import queue
from collections.abc import Callable
from typing import Final, NamedTuple

import torch
from torch import Tensor

from quarkconv.load.open_files import BLOCK

_BUFFERS: Final = 16
"""Two for each of the threads that read."""


class _Buffer(NamedTuple):
    """Page-locked memory, and the event after which its last copy is done."""

    memory: memoryview
    tensor: Tensor
    copied: torch.cuda.Event


class Staging:
    """The buffers of a device, and the stream that copies from them. Threads share it.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        with torch.cuda.device(device):
            self.stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        self._free: queue.SimpleQueue[_Buffer] = queue.SimpleQueue()
        whole = torch.empty(_BUFFERS * BLOCK, dtype=torch.uint8, pin_memory=True)
        for start in range(0, len(whole), BLOCK):
            tensor, event = whole[start : start + BLOCK], torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._free.put(_Buffer(tensor.numpy().data, tensor, event))

    def memory(self, nbytes: int) -> DeviceMemory:
        """New memory of the device."""
        return DeviceMemory(self, nbytes)

    def copy(self, out: Tensor, read: Callable[[memoryview], int]) -> int:
        """Fill a tensor uint8 [n] from its beginning, and return how many bytes ``read`` read."""
        buffer = self._free.get()
        try:
            buffer.copied.synchronize()
            count = read(buffer.memory[: len(out)])
            with torch.cuda.stream(self.stream):
                out[:count].copy_(buffer.tensor[:count], non_blocking=True)
                buffer.copied.record(self.stream)
        finally:
            self._free.put(buffer)
        return count


class DeviceMemory:
    """Memory of a GPU, filled through the buffers of a :class:`Staging`.

    The allocator gives it out again in the order of the stream that copies: only free it when the kernels that read it
    are done. Were it that of the kernels, copies would wait for all that are queued.
    """

    block: int = BLOCK

    def __init__(self, staging: Staging, nbytes: int) -> None:
        self._staging = staging
        with torch.cuda.stream(staging.stream):
            self.tensor = torch.empty(max(nbytes, 1), dtype=torch.uint8, device=staging.device)

    def fill(self, at: int, nbytes: int, read: Callable[[memoryview], int]) -> int:
        """Fill bytes from ``at`` on with ``read``, and return how many it read."""
        return self._staging.copy(self.tensor[at : at + nbytes], read)

    def finish(self) -> None:
        """Wait until all reads are on the device."""
        self._staging.stream.synchronize()
