"""Blocks of remote files fetched by several threads before they are needed, in bounded memory."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from typing import Final

from quarkconv.errors import InterruptedByUser
from quarkconv.files.base import Range
from quarkconv.files.blocks import BLOCK_BYTES, blocks

AHEAD_BYTES: Final = 4 * BLOCK_BYTES
"""Bytes that one reader asks for before they are needed."""
AHEAD_BLOCKS: Final = 16
"""Requests that one reader has under way: small blocks cost the time of a round trip and nothing else."""
_PATIENCE: Final = 0.2  # seconds between looks at whether somebody wants to stop

Fetch = Callable[[Range], bytes]


class ReadAhead:
    """Reads ranges that were announced, in the order in which they were announced.

    A context manager; what is under way when it is left is dropped.

    Args:
        ranges: what will be read.
        fetch: gets one block; called from several threads.
        pool: the threads, shared with others.
        stop: set by whoever wants the reading to end.
    """

    def __init__(self, ranges: Iterable[Range], fetch: Fetch, pool: ThreadPoolExecutor, stop: threading.Event) -> None:
        self._blocks = blocks(ranges)
        self._fetch = fetch
        self._pool = pool
        self._stop = stop
        self._queue: deque[tuple[Range, Future[bytes]]] = deque()
        self._ahead = 0

    def __enter__(self) -> ReadAhead:
        self._ask()
        return self

    def __exit__(self, *_: object) -> None:
        for _, future in self._queue:
            future.cancel()
        self._queue.clear()

    def fill(self, file: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of an announced range from ``start`` on.

        Raises:
            SourceError: the bytes could not be had.
            InterruptedByUser: somebody wanted the reading to end.
        """
        done = 0
        while done < len(view):
            position = start + done
            block, data = self._block(file, position)
            part = memoryview(data)[position - block.start : position - block.start + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)

    def _block(self, file: str, position: int) -> tuple[Range, bytes]:
        """The block that holds a byte; those before it are not needed any more."""
        while self._queue:
            block, future = self._queue[0]
            if block.file == file and block.start <= position < block.end:
                return block, self._result(future)
            self._queue.popleft()
            future.cancel()
            self._ahead -= block.end - block.start
            self._ask()
        raise ValueError(f"byte {position} of {file} was not announced, or not in this order")

    def _ask(self) -> None:
        while len(self._queue) < AHEAD_BLOCKS and (self._ahead < AHEAD_BYTES or not self._queue):
            block = next(self._blocks, None)
            if block is None:
                return
            self._queue.append((block, self._pool.submit(self._fetch, block)))
            self._ahead += block.end - block.start

    def _result(self, future: Future[bytes]) -> bytes:
        while True:
            if self._stop.is_set():
                raise InterruptedByUser(
                    "Interrupted; what was finished is kept",
                    hint="give the same command again: it resumes where it stopped",
                )
            try:
                return future.result(timeout=_PATIENCE)
            except FutureTimeout:
                if future.done():  # it failed with a timeout of its own
                    raise


def read_ahead(ranges: Iterable[Range], fetch: Fetch, pool: ThreadPoolExecutor) -> Iterator[bytes]:
    """The bytes of each range, read ahead."""
    wanted = list(ranges)
    with ReadAhead(wanted, fetch, pool, threading.Event()) as reader:
        for file, start, end in wanted:
            data = bytearray(end - start)
            reader.fill(file, start, memoryview(data))
            yield bytes(data)
