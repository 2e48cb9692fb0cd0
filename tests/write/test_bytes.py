"""The same bytes always: whatever the threads, the place, the segments, and what reads and writes do at a time."""

from __future__ import annotations

import errno
import logging
import os
import random
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from support.conversions import SHARD, convert, execute
from support.program import snapshot
from support.progress import Bytes

import quarkconv
from quarkconv.plan.pieces import Copy, OutputShard, OutputTensor
from quarkconv.plan.shards import PAGE
from quarkconv.write import executor, output_file, segments
from quarkconv.write.output_file import BlockStream, DirectWrites, OutputFile, aligned_buffer
from quarkconv.write.segments import cut


@pytest.mark.parametrize("jobs", [1, 2, 7])
def test_the_bytes_do_not_depend_on_jobs_or_place(
    source: Path, reference: dict[str, str], tmp_path: Path, jobs: int
) -> None:
    moved = tmp_path / "another place"
    shutil.copytree(source, moved)
    for file in moved.rglob("*"):
        os.utime(file, (1, 1))
    assert snapshot(convert(moved, tmp_path / "deep" / "out", jobs=jobs)) == reference


def test_the_output_holds_no_path_and_no_time(small: Path, tmp_path: Path) -> None:
    first = snapshot(convert(small, tmp_path / "first"))
    text = (tmp_path / "first" / "quarkconv.json").read_text()
    assert str(tmp_path) not in text
    assert "first" not in text
    time.sleep(0.01)
    assert snapshot(convert(small, tmp_path / "second")) == first


@pytest.mark.parametrize("jobs", [1, 3])
def test_buffers_and_segments_may_be_as_small_as_a_page(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jobs: int
) -> None:
    monkeypatch.setattr(executor, "BUFFER_BYTES", PAGE)
    default = cut.__defaults__
    monkeypatch.setattr(cut, "__defaults__", (PAGE,))
    plan = quarkconv.plan_conversion(source, "fused-int8", max_shard_size=SHARD)
    assert max(len(list(cut(shard))) for shard in plan.shards) > 8
    assert snapshot(convert(source, tmp_path / "out", jobs=jobs)) == reference
    assert default == (segments.SEGMENT_BYTES,)


def test_partial_writes_and_reads_are_continued(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = snapshot(convert(small, tmp_path / "whole"))
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda descriptor, view, at: pwrite(descriptor, view[:1300], at))
    monkeypatch.setattr(os, "preadv", lambda descriptor, views, at: preadv(descriptor, [views[0][:11]], at))
    assert snapshot(convert(small, tmp_path / "parts")) == expected


def test_progress_adds_up_to_what_is_written(source: Path, tmp_path: Path) -> None:
    plan = quarkconv.plan_conversion(source, "fused-int8", max_shard_size=SHARD)
    done: list[int] = []
    execute(plan, source, tmp_path / "out", jobs=2, progress=Bytes(done.append))
    assert sum(done) == plan.output_bytes
    assert min(done) > 0


# Segments


def shard_of(header: int, *tensors: list[int]) -> OutputShard:
    """A shard of copies of the given lengths."""
    planned = (
        OutputTensor(f"t{number}", "I8", (sum(sizes),), tuple(Copy(f"t{number}", "f", 0, size) for size in sizes))
        for number, sizes in enumerate(tensors)
    )
    return OutputShard("shard", header, tuple(planned))


def test_segments_are_runs_of_pieces_that_start_on_a_page() -> None:
    rng = random.Random(3)
    for _ in range(300):
        sizes = [[rng.choice([0, 1, 100, PAGE - 1, PAGE, 3 * PAGE]) for _ in range(rng.randrange(1, 9))] for _ in "abc"]
        shard = shard_of(rng.choice([PAGE, 2 * PAGE, 100]), *sizes)
        size = rng.choice([1, PAGE, 3 * PAGE, 10**9])
        found = list(cut(shard, size))
        pieces = [piece for tensor in shard.tensors for piece in tensor.pieces]
        assert [piece for segment in found for piece in segment.pieces] == pieces
        assert found[0].start == found[0].first == 0
        for segment, following in pairwise(found):
            assert following.first == segment.first + len(segment.pieces)
            assert following.start % PAGE == 0
            written = sum(piece.output_nbytes for piece in pieces[: following.first])
            assert following.start == shard.header + written
            assert following.start - segment.start >= size
    whole = shard_of(PAGE, [PAGE] * 9)
    assert [segment.start // PAGE for segment in cut(whole, 3 * PAGE)] == [0, 3, 6, 9]
    assert len(list(cut(shard_of(PAGE, [100] * 1000), PAGE))) == 1  # no piece starts on a page but the first
    assert list(cut(shard_of(PAGE, []), 1)) == [(0, (), 0)]


# Direct writes


class Refusing:
    """A file system that takes no direct writes: at open, or only when it comes to it."""

    def __init__(self, when: str, number: int) -> None:
        self.when, self.error = when, OSError(number, os.strerror(number))
        self.open, self.pwrite = os.open, os.pwrite
        self.refused = 0

    def opening(self, path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if self.when == "open" and flags & os.O_DIRECT:
            self.refused += 1
            raise self.error
        return self.open(path, flags, *args, **kwargs)

    def writing(self, descriptor: int, data: memoryview, offset: int) -> int:
        import fcntl

        if self.when == "write" and fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
            self.refused += 1
            raise self.error
        return self.pwrite(descriptor, data, offset)


@pytest.mark.parametrize("when", ["open", "write"])
@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
def test_where_direct_writes_are_refused_the_page_cache_is_used_with_one_warning(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, when: str, number: int,
) -> None:  # fmt: skip
    refusing = Refusing(when, number)
    flushed = []
    fdatasync = os.fdatasync
    monkeypatch.setattr(os, "open", refusing.opening)
    monkeypatch.setattr(os, "pwrite", refusing.writing)
    monkeypatch.setattr(os, "fdatasync", lambda descriptor: (flushed.append(1), fdatasync(descriptor)))
    with caplog.at_level(logging.INFO, logger="quarkconv"):
        assert snapshot(convert(source, tmp_path / "out")) == reference
    assert refusing.refused == 1
    warnings = [record.getMessage() for record in caplog.records if "page cache" in record.getMessage()]
    assert len(warnings) == 1
    assert str(tmp_path / "out") in warnings[0]
    assert flushed  # so that no fsync takes long, and an interrupt is quick


def test_two_threads_whose_direct_writes_are_refused_at_the_same_time_both_use_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    both, refused = threading.Barrier(2), []
    pwrite = os.pwrite

    def writing(descriptor: int, data: memoryview, offset: int) -> int:
        if offset not in refused:
            refused.append(offset)
            both.wait(10)  # neither has changed the file to the page cache yet
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return pwrite(descriptor, data, offset)

    file = OutputFile(tmp_path / "file", 2 * PAGE, DirectWrites())
    if not file._is_direct():
        pytest.skip("this file system refuses O_DIRECT")
    monkeypatch.setattr(os, "pwrite", writing)
    blocks = [aligned_buffer(PAGE), aligned_buffer(PAGE)]
    blocks[1][:] = b"1" * PAGE
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(file.write, blocks, (0, PAGE)))
    file.seal()
    assert sorted(refused) == [0, PAGE]
    assert (tmp_path / "file").read_bytes() == bytes(PAGE) + b"1" * PAGE


def test_a_file_that_is_not_sealed_is_removed(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "file", PAGE, DirectWrites())
    file.close()
    file.close()
    assert not (tmp_path / "file").exists()
    sealed = OutputFile(tmp_path / "file", PAGE, DirectWrites())
    sealed.seal()
    sealed.close()
    assert (tmp_path / "file").stat().st_size == PAGE


def test_writes_are_direct_where_the_file_system_takes_them(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fcntl

    pwrite = os.pwrite
    direct = []

    def watched(descriptor: int, data: memoryview, offset: int) -> int:
        if len(data) >= PAGE:
            direct.append(bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT))
        return pwrite(descriptor, data, offset)

    try:
        os.close(os.open(tmp_path / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        pytest.skip("this file system refuses O_DIRECT")
    monkeypatch.setattr(os, "pwrite", watched)
    convert(source, tmp_path / "out")
    assert direct
    assert all(direct)


def test_a_direct_write_that_is_cut_short_is_continued_through_the_page_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pwrite = os.pwrite
    lengths: list[int] = []

    def short(descriptor: int, data: memoryview, offset: int) -> int:
        lengths.append(len(data))
        return pwrite(descriptor, data, offset) if len(lengths) > 1 else _write_part(descriptor, data, offset, 1000)

    def _write_part(descriptor: int, data: memoryview, offset: int, count: int) -> int:
        with open(f"/proc/self/fd/{descriptor}", "r+b") as again:  # a direct write takes whole blocks only
            again.seek(offset)
            again.write(data[:count])
        return count

    monkeypatch.setattr(os, "pwrite", short)
    expected = random.Random(1).randbytes(3 * PAGE)
    buffer = aligned_buffer(3 * PAGE)
    buffer[:] = expected
    file = OutputFile(tmp_path / "file", len(expected), DirectWrites())
    file.write(buffer, 0)
    file.seal()
    assert lengths == [3 * PAGE, 3 * PAGE - 1000]
    assert (tmp_path / "file").read_bytes() == expected


def test_a_stream_writes_what_was_put_into_it_however_it_was_cut(tmp_path: Path) -> None:
    rng = random.Random(5)
    for number in range(60):
        path = tmp_path / str(number)
        parts = [rng.randbytes(rng.choice([0, 1, 999, PAGE, 5 * PAGE, 20_001])) for _ in range(rng.randrange(6))]
        whole = b"".join(parts)
        reported: list[int] = []
        file = OutputFile(path, 3 * PAGE + len(whole), DirectWrites())
        stream = BlockStream(file, aligned_buffer(2 * PAGE), 3 * PAGE, reported.append)
        for part in parts:
            stream.put(memoryview(part))
        stream.finish()
        assert sum(reported) == len(whole)
        file.seal()
        assert path.read_bytes() == bytes(3 * PAGE) + whole


def test_the_platform_may_have_no_direct_writes(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(output_file, "_DIRECT", 0)
    assert snapshot(convert(source, tmp_path / "out", jobs=2)) == reference


# Reserved space


def test_the_space_of_a_file_is_reserved_before_the_first_write(tmp_path: Path) -> None:
    file = OutputFile(tmp_path / "file", 3_000_001, DirectWrites())
    assert (tmp_path / "file").stat().st_blocks * 512 >= 3_000_001
    file.seal()
    assert (tmp_path / "file").stat().st_size == 3_000_001


@pytest.mark.parametrize("number", [errno.EOPNOTSUPP, errno.ENOSYS, None])
def test_where_space_cannot_be_reserved_it_is_done_without(
    source: Path, reference: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int | None
) -> None:
    import ctypes

    def refuse(*_: int) -> int:
        assert number is not None
        ctypes.set_errno(number)
        return -1

    monkeypatch.setattr(output_file, "_fallocate", lambda: None if number is None else refuse)
    assert snapshot(convert(source, tmp_path / "out", jobs=2)) == reference


def test_missing_space_for_a_file_is_reported_before_it_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ctypes

    answers = [errno.EINTR, errno.ENOSPC]

    def refuse(*_: int) -> int:
        ctypes.set_errno(answers.pop(0))
        return -1

    monkeypatch.setattr(output_file, "_fallocate", lambda: refuse)
    with pytest.raises(OSError, match="No space left"):
        OutputFile(tmp_path / "file", 10**6, DirectWrites())
    assert not answers
