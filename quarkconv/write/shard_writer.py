"""Writing one shard with several threads, a segment each."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from itertools import islice

import xxhash

from quarkconv.plan.manifest import WrittenPiece, WrittenShard, WrittenTensor
from quarkconv.plan.pieces import Copy, OutputShard, OutputTensor, Piece, Rows
from quarkconv.plan.shards import encode_header
from quarkconv.scheme.scale_values import are_usual, zeros
from quarkconv.write.checked_scales import CodesOfScales, ZeroScales, check_scale, is_scale
from quarkconv.write.destination import ShardFile
from quarkconv.write.held_scales import HeldScales
from quarkconv.write.output_file import BlockStream
from quarkconv.write.segments import Segment, cut
from quarkconv.write.source import Reader, Source
from quarkconv.write.transforms import scale_elements, transformed


class ShardWriter:
    """A shard that is being written.

    Args:
        shard: the shard.
        file: its file, opened.

    Attributes:
        shard: the shard.
        segments: its segments; they may be written in any order and concurrently. A file that is written in order has
            one.
    """

    def __init__(self, shard: OutputShard, file: ShardFile) -> None:
        self.shard = shard
        self.segments = list(cut(shard, shard.nbytes + 1) if file.in_order else cut(shard))
        self._header = encode_header(shard.tensors)
        self._checksums: dict[int, list[str]] = {}
        self._lock = threading.Lock()
        self._file = file

    def write(
        self,
        segment: Segment,
        sources: Source,
        buffer: memoryview,
        wrote: Callable[[int], None],
        held: HeldScales,
        codes: CodesOfScales,
    ) -> bool:
        """Write one segment; True when all segments are written.

        Args:
            segment: one of :attr:`segments`.
            sources: the source.
            buffer: page-aligned memory of whole pages that no other thread uses.
            wrote: called with the number of bytes after each block; what it raises ends the writing.
            held: scales that were computed together with codes.
            codes: those of the scales.

        Raises:
            OSError: writing failed.
            SourceError: reading failed, or a scale has an invalid value.
            UnsupportedError: a row of a float weight cannot be quantized.
        """
        stream = BlockStream(self._file, buffer, segment.start, wrote)
        if segment.start == 0:
            stream.put(memoryview(self._header))
        checksums: list[str] = []
        of_zero: list[ZeroScales] = []
        with sources.ahead(held.reads(segment.pieces)) as reader:
            for (tensor, number, of_scale), piece in zip(self._places(segment), segment.pieces, strict=True):
                if of_scale and isinstance(piece, Copy | Rows):
                    checksum, positions = _put_scale(stream, piece, reader)
                    if positions:
                        of_zero.append(ZeroScales(tensor, number, positions))
                else:
                    checksum = _put_piece(stream, piece, reader, held)
                checksums.append(checksum)
        for found in of_zero:
            codes.check_zeros(found, sources)
        stream.finish()
        with self._lock:
            self._checksums[segment.first] = checksums
            return len(self._checksums) == len(self.segments)

    def seal(self) -> WrittenShard:
        """Make the file durable when all segments are written; returns its record for the manifest."""
        self._file.seal()
        in_order = iter([checksum for _, part in sorted(self._checksums.items()) for checksum in part])
        tensors = tuple(
            WrittenTensor(
                tensor.name,
                tensor.dtype,
                tensor.shape,
                tuple(WrittenPiece(piece, next(in_order)) for piece in tensor.pieces),
            )
            for tensor in self.shard.tensors
        )
        checksum = xxhash.xxh3_128_hexdigest(self._header)
        return WrittenShard(self.shard.file, self.shard.nbytes, self.shard.header, checksum, tensors)

    def source_names(self) -> set[str]:
        """The source files that the shard reads."""
        return {source.file for piece in self.shard.pieces() for source in piece.reads()}

    def _places(self, segment: Segment) -> Iterator[tuple[OutputTensor, int, bool]]:
        """The tensor of each piece of a segment, the piece's number in it, and whether it is a scale."""
        tensors = ((tensor, is_scale(tensor)) for tensor in self.shard.tensors)
        places = ((tensor, number, scale) for tensor, scale in tensors for number in range(len(tensor.pieces)))
        return islice(places, segment.first, segment.first + len(segment.pieces))

    def close(self) -> None:
        """Close the file, complete or not."""
        self._file.close()


def _put_piece(stream: BlockStream, piece: Piece, reader: Reader, held: HeldScales) -> str:
    """Append the output bytes of a piece; returns their checksum."""
    hasher = xxhash.xxh3_128()
    if not isinstance(piece, Copy):
        for data in transformed(piece, reader, held):
            hasher.update(data)
            stream.put(memoryview(data))
        return hasher.hexdigest()
    done = 0
    while done < piece.nbytes:
        room = stream.room()[: piece.nbytes - done]
        reader.fill(piece, done, room)
        hasher.update(room)
        stream.filled(len(room))
        done += len(room)
    return hasher.hexdigest()


def _put_scale(stream: BlockStream, piece: Copy | Rows, reader: Reader) -> tuple[str, list[int]]:
    """Append a scale, and check its values; returns the checksum of its bytes, and the positions of its zeros."""
    room = stream.room()
    if isinstance(piece, Copy) and piece.nbytes <= len(room):  # as nearly always: half of all pieces are scales
        room = room[: piece.nbytes]
        reader.fill(piece, 0, room)
        elements = room.tobytes()
        of_zero = _zeros(piece, elements)
        stream.filled(piece.nbytes)
        return xxhash.xxh3_128_hexdigest(elements), of_zero
    hasher = xxhash.xxh3_128()
    of_zero, count = [], 0
    for block in scale_elements(piece, reader):
        of_zero += [count + position for position in _zeros(piece, block)]
        count += len(block) // 4
        data = block if isinstance(piece, Copy) else block * piece.repeat
        hasher.update(data)
        stream.put(memoryview(data))
    return hasher.hexdigest(), of_zero


def _zeros(piece: Copy | Rows, elements: bytes | bytearray) -> list[int]:
    """The positions of zeros among some elements of a scale, which are checked."""
    if are_usual(elements):
        return []
    check_scale(piece.source, elements)
    return zeros(elements)
