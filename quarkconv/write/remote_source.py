"""A remote source: byte ranges go from the network directly into the output."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Final

import xxhash

from quarkconv.files.base import Range
from quarkconv.files.read_ahead import ReadAhead
from quarkconv.files.remote import RemoteFiles
from quarkconv.plan.manifest import WrittenFile
from quarkconv.plan.pieces import Copy, SourceFile
from quarkconv.plan.plan import Plan
from quarkconv.write.locks import waiting_for
from quarkconv.write.refusals import not_as_planned
from quarkconv.write.source import Reader
from quarkconv.write.source_files import check_layout
from quarkconv.write.state import FileState

_COPY_BYTES: Final = 2**20


class RemoteSource:
    """The remote shards that a plan reads.

    Args:
        files: the files of the model.
        plan: the plan.
        turn: a file that processes on one machine lock while they read from a slow network, so that one of them gets
            all of it while the others send; None without others.

    Raises:
        SourceError: a file has another size than planned.
    """

    def __init__(self, files: RemoteFiles, plan: Plan, turn: Path | None) -> None:
        self._files = files
        self._turn = turn
        self._names = [name for name, _ in plan.sources]
        self._stop = threading.Event()
        for name, size in plan.sources:
            found = files.size(name)
            if found != size:
                raise not_as_planned(
                    f"{files}/{name}", f"{size} bytes", "no file" if found is None else f"{found} bytes"
                )

    def check_layout(self, plan: Plan) -> None:
        """Raise if a planned range is not in its tensor any more."""
        check_layout(plan, self._files)
        if plan.rank.is_whole:  # other ranks read the same headers
            self._files.forget()

    def state(self) -> list[FileState]:
        """Name, size and ETag of each file, in order."""
        return [(name, self._files.size(name) or 0, self._files.etag(name)) for name in self._names]

    def check_unchanged(self, names: Iterable[str]) -> None:
        """Check the ETags of some files again.

        Raises:
            SourceError: one has another ETag, or is gone.
        """
        if not self._files.pins_etags:
            self._files.check_unchanged(names)

    @contextmanager
    def ahead(self, ranges: Iterable[Copy]) -> Iterator[Reader]:
        """Fetch ranges over several connections; they must be read in this order."""
        requests = (Range(source.file, source.start, source.start + source.nbytes) for source in ranges)
        files = self._files
        turn = nullcontext() if self._turn is None or not self.is_slow else waiting_for(self._turn)
        with turn, ReadAhead(requests, files.fetch, files.pool, self._stop, files.ahead_bytes, files.pace) as reader:
            yield _RangeReader(reader)

    def copy(self, file: SourceFile, part: Path) -> WrittenFile:
        """Fetch a file as it is, durably."""
        hasher = xxhash.xxh3_128()
        with open(part, "wb") as handle:
            for data in self.blocks(file):
                hasher.update(data)
                handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        return WrittenFile(file.name, file.size, hasher.hexdigest())

    def blocks(self, file: SourceFile) -> Iterator[bytes]:
        """The bytes of a file, in blocks."""
        starts = range(0, file.size, _COPY_BYTES)
        return self._files.read_many(Range(file.name, start, min(start + _COPY_BYTES, file.size)) for start in starts)

    @property
    def is_slow(self) -> bool:
        """Whether the network is slow, or its rate is not known yet."""
        return not self._files.pace.is_fast

    def cancel(self) -> None:
        """Make reads that wait for the network fail soon."""
        self._stop.set()

    def close(self) -> None:
        """Stop fetching."""
        self._stop.set()


class _RangeReader:
    """Reads the ranges that are being fetched."""

    def __init__(self, reader: ReadAhead) -> None:
        self._reader = reader

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:
        """Fill ``view`` with the bytes of a range from ``offset`` on."""
        self._reader.fill(source.file, source.start + offset, view)
