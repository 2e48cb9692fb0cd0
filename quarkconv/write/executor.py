"""A run through the shards of a plan: byte ranges are read, checksummed and written.

Threads take segments of shards in turn, each with its own buffer: while one waits for the disk, another reads and
computes checksums. Memory does not grow with the model.
"""

from __future__ import annotations

import json
import logging
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager
from typing import Final

import xxhash

from quarkconv.errors import InterruptedByUser, interrupted
from quarkconv.files.arenas import trim_heaps
from quarkconv.headers.file_names import CONFIG_NAME, INDEX_NAME
from quarkconv.plan.manifest import Manifest, WrittenFile, WrittenShard, manifest_to_bytes
from quarkconv.plan.pieces import OutputShard, SourceFile
from quarkconv.plan.plan import Plan
from quarkconv.plan.shards import PAGE
from quarkconv.progress import SILENT, Progress
from quarkconv.version import own_version
from quarkconv.write.checked_scales import CodesOfScales
from quarkconv.write.claims import Claims
from quarkconv.write.destination import Destination
from quarkconv.write.held_scales import HeldScales
from quarkconv.write.output_file import aligned_buffer
from quarkconv.write.shard_writer import ShardWriter
from quarkconv.write.source import Source
from quarkconv.write.space import records_nbytes

BUFFER_BYTES: Final = 2 * 2**20
"""Bytes of a write: few enough to be in the CPU's cache when their checksum is computed."""
STREAM_BUFFER_BYTES: Final = 2**20
"""The same for a stream, which copies them: more would only take memory."""
ALL_BUFFERS_BYTES: Final = 32 * 2**20
"""Bytes of the buffers of all threads, however many there are."""
ALONE_BYTES: Final = 5 * 2**20
"""Bytes of the first shard that are streamed before others begin, so that its first part is sent soon."""
_SURROGATE: Final = re.compile("[\ud800-\udfff]")

_log: Final = logging.getLogger(__name__)


class Run:
    """One run of a plan, whose source and destination are open."""

    def __init__(self, plan: Plan, sources: Source, destination: Destination, progress: Progress) -> None:
        self.plan = plan
        self.sources = sources
        self.destination = destination
        self._progress = progress
        self._progress_lock = threading.Lock()
        self._stop = threading.Event()
        self._shards: tuple[OutputShard, ...] = ()
        self._done: dict[str, WrittenShard] = {}
        self.recorded: list[WrittenShard] = []
        self._held = HeldScales()
        self._codes = CodesOfScales(plan.shards)
        self._written: Callable[[OutputShard], None] = lambda _: None

    def writing(self) -> AbstractContextManager[None]:
        """Turn failures to write into errors with a hint."""
        return self.destination.failures(self._bytes_left)

    def write_shards(self, shards: tuple[OutputShard, ...], jobs: int) -> None:
        """Write those of some shards that are not finished yet, with ``jobs`` threads.

        After a failure, the run is over; else it may be called again for other shards.
        """
        self._shards = shards
        before = len(self._done)
        self.destination.read_records(shards)
        for shard in shards:
            written = self.destination.finished(shard)
            if written is not None:
                self._done[shard.file] = written
                self.count(shard.nbytes)
        todo = [shard for shard in shards if shard.file not in self._done]
        self._held = HeldScales(todo, self._stop)
        if len(self._done) > before:
            _log.info("resuming: %d of %d shards are finished", len(self._done) - before, len(shards))
        self.destination.require_space(self._bytes_left(), shards)
        self._write(todo, jobs)

    def write_leased(self, shards: Iterator[OutputShard], jobs: int, done: Callable[[OutputShard], None]) -> None:
        """Write shards that are taken when a thread is free, with ``jobs`` threads; to a destination that streams.

        Args:
            shards: the shards, none of them finished; one thread at a time asks for the next.
            jobs: number of threads.
            done: called with each shard that was written, from several threads.
        """
        self._held = HeldScales(stop=self._stop)
        self._written = done

        def taken() -> Iterator[OutputShard]:
            for shard in shards:
                self._held.expect([shard])
                yield shard

        self._write(taken(), jobs)

    def _write(self, shards: Iterable[OutputShard], jobs: int) -> None:
        """Write shards. Of those that are streamed, a few are read at a time; other threads send the rest of theirs."""
        streams = self.destination.streams
        reading = -(-jobs // 2) if streams else jobs
        threads = jobs + reading if streams else jobs
        alone = ALONE_BYTES if streams else 0
        with ThreadPoolExecutor(max_workers=threads, thread_name_prefix="quarkconv") as pool:
            claims = Claims(shards, self._open, self._stop, reading, alone, lambda: self.sources.is_slow)
            largest = min(BUFFER_BYTES, STREAM_BUFFER_BYTES) if streams else BUFFER_BYTES
            size = max(min(largest, ALL_BUFFERS_BYTES // threads // PAGE * PAGE), PAGE)
            futures = [pool.submit(self._work, claims, size) for _ in range(threads)]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                raise interrupted() from None
            finally:
                if not all(future.done() and future.exception() is None for future in futures):
                    self._stop.set()  # the others stop at their next block
                    self.sources.cancel()
                wait(futures)
                claims.close()
        errors = [error for future in futures if (error := future.exception())]
        if errors:  # the first cause, not the threads that stopped because of it
            raise next((error for error in errors if not isinstance(error, InterruptedByUser)), errors[0])

    def end_progress(self) -> None:
        """Report no more progress: all bytes of this process were counted, and finishing counts none."""
        self._progress = SILENT

    def count(self, nbytes: int) -> None:
        """Count bytes that are written, by this process or another worker."""
        with self._progress_lock:
            self._progress.advance(nbytes)

    def finish(self) -> Manifest:
        """Write the other files when all shards are written, the manifest after them, and move all to their places."""
        others = self._write_others()
        trim_heaps()  # of the buffers
        manifest = Manifest(
            quarkconv=own_version(),
            plan=self.destination.plan_digest,
            target=self.plan.target,
            scheme=self.plan.scheme,
            producer_version=self.plan.producer_version,
            moe=self.plan.moe,
            sources=self.plan.sources,
            shards=tuple(self._done[shard.file] for shard in self.plan.shards),
            files=tuple(sorted(others)),
        )
        self.destination.publish(self.plan.file_names(), manifest_to_bytes(manifest))
        return manifest

    def _write_others(self) -> list[WrittenFile]:
        """Write everything that is neither a shard nor the manifest."""
        return [
            *map(self._copy, self.plan.copies),
            *(self._write_text(file.name, file.text) for file in self.plan.texts),
            self._write_json(CONFIG_NAME, self.plan.config),
            self._write_json(INDEX_NAME, _index(self.plan)),
        ]

    def _work(self, claims: Claims, buffer_size: int) -> None:
        """A thread's loop: write segment after segment, and seal the shard after its last."""
        buffer = aligned_buffer(buffer_size)
        try:
            while not self._stop.is_set():
                claim = claims.take()
                if claim is None:
                    return
                writer, segment = claim
                complete = writer.write(
                    segment, self.sources, buffer, claims.counted(self._wrote), self._held, self._codes
                )
                claims.written()
                if complete:
                    self.sources.check_unchanged(writer.source_names())
                    written = writer.seal()
                    if self.destination.record(written):
                        self.recorded.append(written)
                    self._done[written.file] = written
                    self._written(writer.shard)
        except BaseException:
            self._stop.set()
            raise

    def _open(self, shard: OutputShard) -> ShardWriter:
        return ShardWriter(shard, self.destination.open(shard))

    def _wrote(self, nbytes: int) -> None:
        self.count(nbytes)
        if self._stop.is_set():
            raise interrupted()

    def _copy(self, copy: SourceFile) -> WrittenFile:
        written = self.destination.copy(copy, self.sources)
        self.count(written.size)
        return written

    def _write_json(self, name: str, value: object) -> WrittenFile:
        text = json.dumps(value, indent=2, ensure_ascii=False)
        if _SURROGATE.search(text):  # half a pair in a string of the config: JSON has it escaped only
            text = json.dumps(value, indent=2)
        return self._write_text(name, text + "\n")

    def _write_text(self, name: str, text: str) -> WrittenFile:
        data = text.encode()
        self.destination.write(name, data)
        return WrittenFile(name, len(data), xxhash.xxh3_128_hexdigest(data))

    def _bytes_left(self) -> int:
        """Bytes still to be written; shards in progress count in full."""
        todo = [shard for shard in self._shards if shard.file not in self._done]
        copies = sum(copy.size for copy in self.plan.copies) if len(self._shards) == len(self.plan.shards) else 0
        return sum(shard.nbytes for shard in todo) + copies + records_nbytes(todo)


def _index(plan: Plan) -> dict[str, object]:
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    return {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}
