"""Scales of rows between the computation of their codes and their place in the output: each weight is read once."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator

from quarkconv.plan.pieces import Codes, Copy, OutputShard, Piece, RowScales


class HeldScales:
    """F32 scales by the rows that they belong to; used by several threads.

    Codes lie before their scales in a file, so what is held are the scales of a few tensors: 4 bytes for a row.

    Args:
        shards: those that will be written; only scales that one of them has are held.
    """

    def __init__(self, shards: Iterable[OutputShard] = ()) -> None:
        self._lock = threading.Lock()
        pieces = (piece for shard in shards for tensor in shard.tensors for piece in tensor.pieces)
        self._expected = {piece.source for piece in pieces if isinstance(piece, RowScales)}
        self._held: dict[Copy, bytes] = {}

    def expects(self, rows: Copy) -> bool:
        """Whether the scales of these rows will be taken."""
        with self._lock:
            return rows in self._expected

    def hold(self, rows: Copy, scales: bytes) -> None:
        """Keep scales until they are taken."""
        with self._lock:
            if rows in self._expected:
                self._held[rows] = scales

    def take(self, rows: Copy) -> bytes | None:
        """The scales of these rows; None where they were not computed yet. They are not expected again."""
        with self._lock:
            self._expected.discard(rows)
            return self._held.pop(rows, None)

    def reads(self, pieces: Iterable[Piece]) -> Iterator[Copy]:
        """The ranges that pieces read when they are written in this order by one thread."""
        computed: set[Copy] = set()
        for piece in pieces:
            if isinstance(piece, Codes) and self.expects(piece.source):
                computed.add(piece.source)
            if isinstance(piece, RowScales):
                if piece.source in computed:
                    computed.discard(piece.source)
                    continue
                if self._has(piece.source):
                    continue
            yield from piece.reads()

    def _has(self, rows: Copy) -> bool:
        """Whether scales are held; if not, they are not expected either: who asks computes them itself."""
        with self._lock:
            if rows not in self._held:
                self._expected.discard(rows)
            return rows in self._held
