"""Scales of rows between the computation of their codes and their place in the output: each weight is read once."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Final

from quarkconv.errors import interrupted
from quarkconv.plan.pieces import CodeColumns, Codes, Copy, OutputShard, Piece, RowScales

_POLL_SECONDS: Final = 0.2  # between checks of the stop event


class HeldScales:
    """F32 scales by the rows that they belong to; used by several threads.

    Codes lie before their scales, and threads take work in order. So the codes of any scales are written, or another
    thread writes them, and the thread that needs the scales waits. Only the scales of a few tensors are held: 4 bytes
    for a row.

    Args:
        shards: those that will be written, in this order.
        stop: an event that ends waiting.
    """

    def __init__(self, shards: Iterable[OutputShard] = (), stop: threading.Event | None = None) -> None:
        self._changed = threading.Condition()
        self._stop = stop or threading.Event()
        self._held: dict[Copy, bytes] = {}
        self._takers: Counter[Copy] = Counter()
        self.expect(shards)

    def expect(self, shards: Iterable[OutputShard]) -> None:
        """Hold the scales whose codes lie before them in some shards, none of which is being written yet."""
        computed: set[Copy] = set()
        for piece in (piece for shard in shards for piece in shard.pieces()):
            if isinstance(piece, Codes | CodeColumns):
                computed.add(piece.source)
            elif isinstance(piece, RowScales) and piece.source in computed:
                self._takers[piece.source] += 1

    def expects(self, rows: Copy) -> bool:
        """Whether the scales of these rows are held until they are written."""
        return rows in self._takers

    def hold(self, rows: Copy, scales: bytes) -> None:
        """Keep scales until they are taken."""
        with self._changed:
            self._held[rows] = scales
            self._changed.notify_all()

    def take(self, rows: Copy) -> bytes:
        """The scales of expected rows; waits until their codes are computed.

        Raises:
            InterruptedByUser: ``stop`` was set.
        """
        with self._changed:
            while not self._changed.wait_for(lambda: rows in self._held, _POLL_SECONDS):
                if self._stop.is_set():
                    raise interrupted()
            self._takers[rows] -= 1
            return self._held[rows] if self._takers[rows] else self._held.pop(rows)

    def reads(self, pieces: Iterable[Piece]) -> Iterator[Copy]:
        """The ranges that are read to write pieces."""
        for piece in pieces:
            if not (isinstance(piece, RowScales) and self.expects(piece.source)):
                yield from piece.reads()
