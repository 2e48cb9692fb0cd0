"""Blocks of remote files fetched by several threads before they are needed, in bounded memory."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import contextmanager
from typing import Final

from quarkconv.errors import InterruptedByUser
from quarkconv.files.base import Range
from quarkconv.files.blocks import BLOCK_BYTES, blocks

AHEAD_BYTES: Final = 4 * BLOCK_BYTES
"""Bytes that one reader requests before they are needed."""
AHEAD_BLOCKS: Final = 16
"""Pending requests of one reader: a small block costs a round trip and little else."""
FAST_RATE: Final = 16 * 2**20
"""Bytes per second from which on a network is fast."""
SLOW_BLOCK_BYTES: Final = 2**20
"""The largest request on a slow network, and before its rate is known."""
SLOW_PENDING_BYTES: Final = 2 * 2**20
"""Bytes of pending requests of one reader on a slow network: more of them would only delay the first."""
_MEASURED_BYTES: Final = 2 * 2**20
"""Bytes that a rate is measured with."""
_POLL_SECONDS: Final = 0.2  # between checks of the stop event

Fetch = Callable[[Range], bytes | memoryview]


class Pace:
    """How fast blocks arrive, over all connections."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._pending = 0
        self._last = 0.0
        self._seconds = 0.0
        self._bytes = 0
        self._rate = 0.0

    @property
    def is_fast(self) -> bool:
        """Whether the network is fast; false before its rate is known."""
        return self._rate >= FAST_RATE

    @contextmanager
    def fetching(self, nbytes: int) -> Iterator[None]:
        """Count a request that is under way. The time between requests does not count."""
        self._pass(1, 0)
        received = 0
        try:
            yield
            received = nbytes
        finally:
            self._pass(-1, received)

    def _pass(self, requests: int, nbytes: int) -> None:
        with self._lock:
            now = time.monotonic()
            if self._pending:
                self._seconds += now - self._last
            self._last = now
            self._pending += requests
            self._bytes += nbytes
            if self._bytes >= _MEASURED_BYTES:
                self._rate = self._bytes / self._seconds if self._seconds else FAST_RATE
                self._bytes, self._seconds = 0, 0.0


class ReadAhead:
    """Reads ranges in the order in which they were announced.

    A context manager; leaving it cancels pending requests.

    Args:
        ranges: the ranges, announced.
        fetch: fetches one block; called from several threads.
        pool: the threads, shared with others.
        stop: an event that ends reading.
        ahead: bytes that are requested before they are needed; None for :data:`AHEAD_BYTES`.
        pace: of the network, shared with other readers; a slow one gets small requests, so that the first bytes come
            soon.
    """

    def __init__(
        self,
        ranges: Iterable[Range],
        fetch: Fetch,
        pool: ThreadPoolExecutor,
        stop: threading.Event,
        ahead: int | None = None,
        pace: Pace | None = None,
    ) -> None:
        self._pace = Pace() if pace is None else pace
        self._blocks = blocks(ranges, self._block_bytes)
        self._fetch = fetch
        self._pool = pool
        self._stop = stop
        self._queue: deque[tuple[Range, Future[bytes | memoryview]]] = deque()
        self._ahead = 0
        self._limit = AHEAD_BYTES if ahead is None else ahead

    def __enter__(self) -> ReadAhead:
        self._request()
        return self

    def __exit__(self, *_: object) -> None:
        for _, future in self._queue:
            future.cancel()
        self._queue.clear()

    def fill(self, file: str, start: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of an announced range from ``start`` on.

        Raises:
            SourceError: the bytes cannot be fetched.
            InterruptedByUser: ``stop`` was set.
        """
        done = 0
        while done < len(view):
            position = start + done
            block, data = self._block(file, position)
            part = memoryview(data)[position - block.start : position - block.start + len(view) - done]
            view[done : done + len(part)] = part
            done += len(part)

    def _block(self, file: str, position: int) -> tuple[Range, bytes | memoryview]:
        """The block that holds a byte; earlier ones are dropped."""
        while self._queue:
            block, future = self._queue[0]
            if block.file == file and block.start <= position < block.end:
                data = self._result(future)
                self._request()
                return block, data
            self._queue.popleft()
            future.cancel()
            self._ahead -= block.end - block.start
            self._request()
        raise ValueError(f"byte {position} of {file} was not announced in this order")

    def _request(self) -> None:
        while len(self._queue) < AHEAD_BLOCKS and (self._ahead < self._limit or not self._queue):
            if not self._pace.is_fast and self._pending() >= SLOW_PENDING_BYTES:
                return
            block = next(self._blocks, None)
            if block is None:
                return
            self._queue.append((block, self._pool.submit(self._counted, block)))
            self._ahead += block.end - block.start

    def _pending(self) -> int:
        """Bytes of the requests that are under way."""
        return sum(block.end - block.start for block, future in self._queue if not future.done())

    def _counted(self, block: Range) -> bytes | memoryview:
        with self._pace.fetching(block.end - block.start):
            return self._fetch(block)

    def _block_bytes(self) -> int:
        return BLOCK_BYTES if self._pace.is_fast else SLOW_BLOCK_BYTES

    def _result(self, future: Future[bytes | memoryview]) -> bytes | memoryview:
        while True:
            if self._stop.is_set():
                raise InterruptedByUser(
                    "Interrupted; finished files are kept",
                    hint="run the same command again: it resumes",
                )
            try:
                return future.result(timeout=_POLL_SECONDS)
            except FutureTimeout:
                if future.done():  # the request itself timed out
                    raise


def read_ahead(
    ranges: Iterable[Range], fetch: Fetch, pool: ThreadPoolExecutor, pace: Pace | None = None
) -> Iterator[bytes]:
    """The bytes of each range, read ahead."""
    announced = list(ranges)
    with ReadAhead(announced, fetch, pool, threading.Event(), pace=pace) as reader:
        for file, start, end in announced:
            data = bytearray(end - start)
            reader.fill(file, start, memoryview(data))
            yield bytes(data)
