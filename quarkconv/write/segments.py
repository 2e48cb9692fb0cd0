"""A shard cut into segments: the unit of work of a thread, so that one large file keeps all of them busy.

A segment is a run of whole pieces that starts on a page of the output file. Pieces, because one thread computes a
checksum from the first byte to the last; pages, because direct I/O writes whole blocks. The other pieces of a segment
may start anywhere: a segment is written as a stream of bytes, cut into blocks wherever pieces end.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final, NamedTuple

from quarkconv.plan.pieces import OutputShard, Piece
from quarkconv.plan.shards import PAGE

SEGMENT_BYTES: Final = 64 * 2**20
"""Least size of a segment, except the last of a shard: long enough that dealing them out costs nothing."""


class Segment(NamedTuple):
    """A run of pieces of one shard.

    Attributes:
        start: offset of the first byte in the output file, a multiple of a page; 0 for the one behind the header.
        pieces: the pieces, in order.
        first: position of the first of them among all pieces of the shard.
    """

    start: int
    pieces: tuple[Piece, ...]
    first: int


def cut(shard: OutputShard, size: int = SEGMENT_BYTES) -> Iterator[Segment]:
    """Cut a shard into segments of at least ``size`` bytes; the first one also stands for the header.

    A shard whose pieces never end on a page is one segment.
    """
    pieces: list[Piece] = []
    start, first = 0, 0
    position = shard.header
    for tensor in shard.tensors:
        for piece in tensor.pieces:
            if pieces and position - start >= size and position % PAGE == 0:
                yield Segment(start, tuple(pieces), first)
                first += len(pieces)
                start, pieces = position, []
            pieces.append(piece)
            position += piece.output_nbytes
    yield Segment(start, tuple(pieces), first)
