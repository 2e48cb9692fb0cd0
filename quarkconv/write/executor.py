"""Carrying out a plan: byte ranges are read, checksummed and written, nothing is decided.

Memory does not grow with the model: each worker has one buffer, and what is computed is a scale at a time.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import closing, contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Final

import xxhash

from quarkconv.errors import InterruptedByUser, SourceError, UnsupportedError, WriteError
from quarkconv.headers.checkpoint import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME
from quarkconv.manifest import (
    Manifest,
    WrittenFile,
    WrittenPiece,
    WrittenShard,
    WrittenTensor,
    manifest_to_bytes,
)
from quarkconv.plan.layout import encode_header
from quarkconv.plan.pieces import Check, OutputShard, Piece, Plan
from quarkconv.plan.serialize import plan_digest
from quarkconv.write.source_files import SourceFiles
from quarkconv.write.staging import Staging, as_write_error, open_staging
from quarkconv.write.transforms import transform

BUFFER_BYTES: Final = 8 * 2**20

Progress = Callable[[int], None]
"""Called with the number of bytes that were written, or found written, since the last call."""


def execute(
    plan: Plan, source: Path, output: Path, *, jobs: int, overwrite: bool = False, progress: Progress = lambda _: None
) -> Manifest:
    """Carry out a plan.

    Args:
        plan: what to do.
        source: directory of the source.
        output: directory to make; unfinished work of the same plan in it is resumed.
        jobs: number of shards that are written at the same time.
        overwrite: whether an earlier conversion in ``output`` is deleted.
        progress: told of bytes as they are written; called from several threads, one at a time.

    Raises:
        SourceError: a source file is not as long as planned, or ends early.
        UnsupportedError: a zero point is not zero, or two scales that must be equal are not.
        UsageError: ``output`` holds something else.
        WriteError: writing failed; what was finished is kept.
        InterruptedByUser: interrupted; what was finished is kept.
    """
    digest = plan_digest(plan)
    files = [shard.file for shard in plan.shards] + [copy.name for copy in plan.copies]
    files += [CONFIG_NAME, INDEX_NAME, MANIFEST_NAME]
    with closing(SourceFiles(source, plan)) as sources:
        run_checks(plan.checks, sources)
        with open_staging(output, digest, sources.state(), files, overwrite=overwrite) as staging:
            run = _Run(plan, sources, staging, progress)
            shards = run.write_shards(jobs)
            others = [run.copy(copy.name) for copy in plan.copies]
            others.append(run.write_json(CONFIG_NAME, plan.config))
            others.append(run.write_json(INDEX_NAME, _index(plan)))
            manifest = Manifest(
                quarkconv=version("quarkconv"),
                plan=digest,
                target=plan.target,
                scheme=plan.scheme,
                producer_version=plan.producer_version,
                moe=plan.moe,
                sources=plan.sources,
                shards=tuple(shards),
                files=tuple(sorted(others)),
            )
            with _writing(staging.folder):
                staging.write(MANIFEST_NAME, manifest_to_bytes(manifest))
                staging.publish(files)
    return manifest


def run_checks(checks: tuple[Check, ...], sources: SourceFiles) -> None:
    """Read what a plan says must hold of the source's data; nothing has been written yet.

    Raises:
        UnsupportedError: it does not hold.
    """
    for check in checks:
        first = sources.read(check.first)
        if check.kind == "zero" and any(first):
            raise UnsupportedError(
                "A zero point is not zero: the weights are not quantized symmetrically", tensor=check.first.tensor,
                file=check.first.file, expected="zeros", found=f"{sum(map(bool, first))} bytes that are not zero",
                hint="quantize the model again with symmetric weights",
            )  # fmt: skip
        if check.kind == "equal" and check.second is not None and first != sources.read(check.second):
            raise UnsupportedError(
                "Gate and up of an expert have different input scales, and the fused tensor has one for both",
                tensor=check.first.tensor, file=check.first.file, expected=f"the value of {check.second.tensor}",
                hint="quantize the model again with dynamic activation scales (ptpc_int8)",
            )  # fmt: skip


class _Run:
    """One execution of a plan."""

    def __init__(self, plan: Plan, sources: SourceFiles, staging: Staging, progress: Progress) -> None:
        self.plan = plan
        self.sources = sources
        self.staging = staging
        self._progress = progress
        self._progress_lock = threading.Lock()
        self._stop = threading.Event()
        self._buffers = threading.local()

    def write_shards(self, jobs: int) -> list[WrittenShard]:
        """Write the shards that are not finished yet, ``jobs`` at a time."""
        done = {shard.file: self.staging.finished(shard) for shard in self.plan.shards}
        todo = [shard for shard in self.plan.shards if done[shard.file] is None]
        for shard in self.plan.shards:
            if done[shard.file] is not None:
                self._advance(shard.nbytes)
        self._check_space(sum(shard.nbytes for shard in todo))
        futures: list[Future[WrittenShard]] = []
        with ThreadPoolExecutor(max_workers=max(1, jobs), thread_name_prefix="quarkconv") as pool:
            try:
                futures.extend(pool.submit(self._write_shard, shard) for shard in todo)
                wait(futures, return_when=FIRST_EXCEPTION)
            except KeyboardInterrupt:
                raise _interrupted() from None
            finally:  # after a failure or an interrupt the others stop at their next buffer
                self._stop.set()
                for future in futures:
                    future.cancel()
        errors = [error for future in futures if not future.cancelled() and (error := future.exception())]
        if errors:  # those that only stopped because another failed do not hide why
            raise next((error for error in errors if not isinstance(error, InterruptedByUser)), errors[0])
        for future in futures:
            written = future.result()
            done[written.file] = written
        return [shard for shard in done.values() if shard is not None]

    def copy(self, name: str) -> WrittenFile:
        """Copy a file of the source as it is."""
        hasher = xxhash.xxh3_128()
        size = 0
        with _writing(self.staging.folder), open(self.staging.part(name), "wb") as handle:
            for block in self._blocks(self.sources.root / name):
                hasher.update(block)
                handle.write(block)
                size += len(block)
                self._advance(len(block))
            handle.flush()
            os.fsync(handle.fileno())
        with _writing(self.staging.folder):
            self.staging.finish(name)
        return WrittenFile(name, size, hasher.hexdigest())

    def write_json(self, name: str, value: object) -> WrittenFile:
        """Write a small JSON file."""
        data = (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode()
        with _writing(self.staging.folder):
            self.staging.write(name, data)
        return WrittenFile(name, len(data), xxhash.xxh3_128_hexdigest(data))

    def _write_shard(self, shard: OutputShard) -> WrittenShard:
        header = encode_header(shard.tensors)
        with _writing(self.staging.folder), open(self.staging.part(shard.file), "wb", buffering=0) as handle:
            _write_all(handle.fileno(), memoryview(header))
            self._advance(len(header))
            tensors = []
            for tensor in shard.tensors:
                pieces = tuple(self._write_piece(handle.fileno(), piece) for piece in tensor.pieces)
                tensors.append(WrittenTensor(tensor.name, tensor.dtype, tensor.shape, pieces))
            os.fsync(handle.fileno())
        checksum = xxhash.xxh3_128_hexdigest(header)
        written = WrittenShard(shard.file, shard.nbytes, shard.header, checksum, tuple(tensors))
        with _writing(self.staging.folder):
            self.staging.record(written)
        return written

    def _write_piece(self, descriptor: int, piece: Piece) -> WrittenPiece:
        hasher = xxhash.xxh3_128()
        for block in self._output(piece):
            if self._stop.is_set():
                raise _interrupted()
            hasher.update(block)
            _write_all(descriptor, block)
            self._advance(len(block))
        return WrittenPiece(piece, hasher.hexdigest())

    def _output(self, piece: Piece) -> Iterator[memoryview]:
        """The output bytes of a piece, a buffer at a time."""
        if piece.widen or piece.repeat != 1:
            yield memoryview(transform(piece, self.sources.read(piece)))
            return
        buffer = self._buffer()
        for offset in range(0, piece.nbytes, BUFFER_BYTES):
            view = buffer[: min(BUFFER_BYTES, piece.nbytes - offset)]
            self.sources.fill(piece, offset, view)
            yield view

    def _buffer(self) -> memoryview:
        """The buffer of this thread."""
        if not hasattr(self._buffers, "view"):
            self._buffers.view = memoryview(bytearray(BUFFER_BYTES))
        view: memoryview = self._buffers.view
        return view

    def _blocks(self, path: Path) -> Iterator[bytes]:
        try:
            with open(path, "rb") as handle:
                while block := handle.read(BUFFER_BYTES):
                    yield block
        except OSError as error:
            raise SourceError(
                "A source file cannot be read", code="shard-missing", file=str(path), found=error.strerror
            ) from error

    def _advance(self, nbytes: int) -> None:
        with self._progress_lock:
            self._progress(nbytes)

    def _check_space(self, needed: int) -> None:
        # What an interrupted run left half-written is overwritten in place, so it counts as free.
        needed -= sum(path.stat().st_size for path in self.staging.parts.glob("*.safetensors"))
        free = shutil.disk_usage(self.staging.folder).free
        if needed > free:
            raise WriteError(
                "There is not enough space for the output", file=str(self.staging.output),
                expected=f"{needed / 1e9:.1f} GB free", found=f"{free / 1e9:.1f} GB free",
                hint=f"free {(needed - free) / 1e9:.1f} GB more, or give --out on another disk; then the same command",
            )  # fmt: skip


def _index(plan: Plan) -> dict[str, object]:
    weight_map = {tensor.name: shard.file for shard in plan.shards for tensor in shard.tensors}
    return {"metadata": {"total_size": plan.tensor_bytes}, "weight_map": dict(sorted(weight_map.items()))}


def _write_all(descriptor: int, view: memoryview) -> None:
    while view:
        view = view[os.write(descriptor, view) :]


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Turn an OSError of writing into a WriteError; errors of reading are a SourceError by then."""
    try:
        yield
    except OSError as error:
        raise as_write_error(error, path) from error


def _interrupted() -> InterruptedByUser:
    return InterruptedByUser(
        "Interrupted; what was finished is kept", hint="give the same command again: it resumes where it stopped"
    )
