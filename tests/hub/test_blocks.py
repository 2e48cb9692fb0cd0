"""Ranges joined to blocks, and blocks read ahead."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quarkconv.errors import InterruptedByUser
from quarkconv.files import read_ahead as module
from quarkconv.files.base import Range
from quarkconv.files.blocks import BLOCK_BYTES, blocks
from quarkconv.files.read_ahead import FAST_RATE, SLOW_BLOCK_BYTES, Pace, ReadAhead, read_ahead

ranges = st.lists(
    st.builds(lambda file, start, size: Range(file, start, start + size), st.sampled_from("ab"),
              st.integers(0, 200), st.integers(0, 60)),
    max_size=20,
)  # fmt: skip


@given(ranges, st.integers(1, 64), st.integers(0, 32))
def test_blocks_hold_every_byte_in_order(parts: list[Range], size: int, gap: int) -> None:
    result = list(blocks(parts, lambda: size, gap))
    assert all(0 < block.end - block.start <= size for block in result)
    position = 0
    for item in parts:
        for byte in range(item.start, item.end):
            while not (result[position].file == item.file and result[position].start <= byte < result[position].end):
                position += 1  # runs off the end when a byte is missing or comes too early


@given(ranges)
def test_what_is_read_along_is_only_gaps(parts: list[Range]) -> None:
    read = sum(block.end - block.start for block in blocks(parts, lambda: 64, 0))
    assert read == sum(item.end - item.start for item in parts)


def test_neighbours_are_one_request() -> None:
    parts = [Range("a", 0, 10), Range("a", 10, 30), Range("a", 32, 40), Range("b", 40, 50), Range("a", 5, 6)]
    assert list(blocks(parts, lambda: 100, 4)) == [Range("a", 0, 40), Range("b", 40, 50), Range("a", 5, 6)]


DATA = {"a": bytes(range(256)) * 4, "b": bytes(reversed(range(256)))}


def fetch(block: Range) -> bytes:
    return DATA[block.file][block.start : block.end]


@given(ranges)
def test_reading_ahead_gives_the_bytes(parts: list[Range]) -> None:
    parts = [Range(item.file, item.start, min(item.end, len(DATA[item.file]))) for item in parts]
    parts = [item for item in parts if item.end > item.start]
    with ThreadPoolExecutor(4) as pool:
        assert list(read_ahead(parts, fetch, pool)) == [fetch(item) for item in parts]


def test_memory_ahead_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "AHEAD_BYTES", 400)
    monkeypatch.setattr(module, "blocks", lambda parts, _: iter(parts))
    fetched: list[Range] = []

    def counting(block: Range) -> bytes:
        fetched.append(block)
        return bytes(block.end - block.start)

    parts = [Range("a", start, start + 100) for start in range(0, 5000, 100)]
    with ThreadPoolExecutor(4) as pool, ReadAhead(parts, counting, pool, threading.Event()) as reader:
        view = memoryview(bytearray(100))
        reader.fill("a", 0, view)
        time.sleep(0.05)
        assert len(fetched) == 4
        reader.fill("a", 1000, view)
        time.sleep(0.05)
        assert 11 <= len(fetched) <= 14


@pytest.mark.parametrize(("seconds", "beside"), [(0.0, 4), (60.0, 1)])
def test_on_a_slow_network_few_bytes_are_requested_at_once(
    monkeypatch: pytest.MonkeyPatch, seconds: float, beside: int
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock) * seconds))
    monkeypatch.setattr(module, "SLOW_PENDING_BYTES", 100)
    monkeypatch.setattr(module, "_MEASURED_BYTES", 100)
    monkeypatch.setattr(module, "blocks", lambda parts, _: iter(parts))
    requested: list[Range] = []
    released = threading.Semaphore(0)

    def waiting(block: Range) -> bytes:
        requested.append(block)
        released.acquire()
        return bytes(block.end - block.start)

    parts = [Range("a", start, start + 100) for start in range(0, 1000, 100)]
    with ThreadPoolExecutor(8) as pool, ReadAhead(parts, waiting, pool, threading.Event(), 500) as reader:
        time.sleep(0.05)
        assert len(requested) == 1
        released.release()
        reader.fill("a", 0, memoryview(bytearray(100)))
        time.sleep(0.05)
        assert len(requested) == 1 + beside
        released.release(20)


@pytest.mark.parametrize(("seconds", "size"), [(0.001, BLOCK_BYTES), (1.0, SLOW_BLOCK_BYTES)])
def test_requests_are_small_until_the_network_is_known_to_be_fast(
    monkeypatch: pytest.MonkeyPatch, seconds: float, size: int
) -> None:
    clock = iter(range(10**6))
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock) * seconds))
    sizes: list[int] = []

    def counting(block: Range) -> bytes:
        sizes.append(block.end - block.start)
        return bytes(sizes[-1])

    whole = Range("a", 0, 8 * BLOCK_BYTES)
    with ThreadPoolExecutor(1) as pool:
        assert [len(data) for data in read_ahead([whole], counting, pool)] == [whole.end]
    assert (sizes[0], max(sizes)) == (SLOW_BLOCK_BYTES, size)


def test_the_time_between_requests_does_not_make_a_network_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    pace = Pace()
    assert not pace.is_fast
    for _ in range(2):
        with pace.fetching(FAST_RATE), pace.fetching(FAST_RATE):  # two at once have twice the rate of one
            now[0] += 2
        now[0] += 100
        assert pace.is_fast
    with pace.fetching(FAST_RATE):
        now[0] += 2
    assert not pace.is_fast


def test_waiting_ends_when_somebody_wants_it_to() -> None:
    stop, never = threading.Event(), threading.Event()

    def stuck(_: Range) -> bytes:
        never.wait(30)
        return b""

    with ThreadPoolExecutor(1) as pool, ReadAhead([Range("a", 0, 8)], stuck, pool, stop) as reader:
        threading.Timer(0.1, stop.set).start()
        with pytest.raises(InterruptedByUser):
            reader.fill("a", 0, memoryview(bytearray(8)))
        never.set()


def test_what_was_not_announced_is_not_read() -> None:
    with (
        ThreadPoolExecutor(1) as pool,
        ReadAhead([Range("a", 0, 8)], fetch, pool, threading.Event()) as reader,
        pytest.raises(ValueError, match="byte 8 of a"),
    ):
        reader.fill("a", 4, memoryview(bytearray(8)))
