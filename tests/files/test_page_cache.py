"""The reported state of the page cache, against what was done to it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from quarkconv.files import page_cache
from quarkconv.files.page_cache import in_page_cache

SIZE = 8 * 2**20


def drop(descriptor: int) -> None:
    os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)


@pytest.fixture
def file(tmp_path: Path) -> Iterator[int]:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(SIZE))
    descriptor = os.open(path, os.O_RDONLY)
    yield descriptor
    os.close(descriptor)


def test_what_was_read_is_there_and_what_was_dropped_is_not(file: int) -> None:
    assert in_page_cache(file, 0, SIZE)
    assert in_page_cache(file, 0, 0)
    drop(file)
    if in_page_cache(file, 0, SIZE):
        pytest.skip("this system does not report it, or this file system keeps its files in memory")
    os.posix_fadvise(file, 0, 0, os.POSIX_FADV_RANDOM)  # nothing is read ahead
    os.pread(file, 3 * mmap.PAGESIZE, 2**20)
    assert in_page_cache(file, 2**20, 3 * mmap.PAGESIZE)
    assert not in_page_cache(file, 2**20, 4 * mmap.PAGESIZE)
    assert not in_page_cache(file, 0, SIZE)


def test_an_unknown_state_counts_as_cached(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    drop(file)
    monkeypatch.setattr(page_cache, "_CACHESTAT", 10**6)  # no such call
    assert in_page_cache(file, 0, SIZE)
    monkeypatch.setattr(page_cache, "_libc", lambda: None)
    assert in_page_cache(file, 0, SIZE)
    assert ctypes.sizeof(page_cache._Stat) == 40
