"""The order in which threads get the segments of shards, and how many of them write at the same time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Final

from quarkconv.plan.pieces import OutputShard
from quarkconv.write.segments import Segment
from quarkconv.write.shard_writer import ShardWriter

_POLL_SECONDS: Final = 0.2  # between checks of the stop event


class Claims:
    """The segments still to be written, dealt out one by one to several threads.

    They come shard after shard, so few shards are in progress at any time, and a crash loses little.

    Args:
        shards: in order.
        open_writer: begins a shard.
        stop: an event that ends waiting.
        reading: the threads that write segments at the same time. They get their places in the order of the shards,
            since a shard may need scales of an earlier one.
        alone: bytes that the first thread writes before others begin.
        is_slow: while it returns true, the others do not begin either.
    """

    def __init__(
        self,
        shards: Iterable[OutputShard],
        open_writer: Callable[[OutputShard], ShardWriter],
        stop: threading.Event,
        reading: int,
        alone: int,
        is_slow: Callable[[], bool],
    ) -> None:
        self._reading = threading.Semaphore(1 if alone else reading)
        self._others = reading - 1 if alone else 0
        self._alone = alone
        self._is_slow = is_slow
        self._stop = stop
        self._lock = threading.Lock()
        self._shards = iter(shards)
        self._open_writer = open_writer
        self._writers: list[ShardWriter] = []
        self._segments: Iterator[Segment] = iter(())

    def take(self) -> tuple[ShardWriter, Segment] | None:
        """The next segment and its shard; None after the last. Call :meth:`written` when it is written."""
        with self._lock:
            while not self._reading.acquire(timeout=_POLL_SECONDS):
                if self._stop.is_set():
                    return None
            while (segment := next(self._segments, None)) is None:
                shard = next(self._shards, None)
                if shard is None:
                    self._reading.release()
                    return None
                self._writers.append(self._open_writer(shard))
                self._segments = iter(self._writers[-1].segments)
            return self._writers[-1], segment

    def written(self) -> None:
        """Let the next thread write."""
        self._reading.release()

    def counted(self, wrote: Callable[[int], None]) -> Callable[[int], None]:
        """A callback for bytes that were written, which lets others begin."""

        def count(nbytes: int) -> None:
            wrote(nbytes)
            self._alone -= nbytes
            if self._alone <= 0 and self._others and not self._is_slow():
                others, self._others = self._others, 0
                self._reading.release(others)

        return count if self._others else wrote

    def close(self) -> None:
        """Close the shards that were not sealed."""
        for writer in self._writers:
            writer.close()
