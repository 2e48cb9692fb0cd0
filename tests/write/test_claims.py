"""The order in which threads get work, and how many of them read where shards are streamed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

from quarkconv.write.claims import Claims


def claims(
    shards: int,
    reading: int,
    alone: int = 0,
    stop: threading.Event | None = None,
    is_slow: Callable[[], bool] = lambda: False,
) -> Claims:
    def opened(shard: Any) -> Any:
        return SimpleNamespace(shard=shard, segments=[f"{shard} whole"])

    names: Any = [f"shard {number}" for number in range(shards)]
    return Claims(names, opened, stop or threading.Event(), reading, alone, is_slow)


def test_a_shard_begins_when_another_is_read() -> None:
    work = claims(4, reading=2)
    assert [work.take() is not None for _ in range(2)] == [True, True]
    with ThreadPoolExecutor(1) as pool:
        third = pool.submit(work.take)
        time.sleep(0.05)
        assert not third.done()
        work.written()
        claimed: Any = third.result(timeout=10)
        assert (claimed[0].shard, claimed[1]) == ("shard 2", "shard 2 whole")


def test_the_first_shard_is_alone_until_its_first_part_is_read() -> None:
    work = claims(4, reading=2, alone=100)
    counted: list[int] = []
    assert work.take() is not None
    wrote = work.counted(counted.append)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(work.take)
        wrote(60)
        time.sleep(0.05)
        assert not second.done()
        wrote(60)
        assert second.result(timeout=10) is not None
    assert counted == [60, 60]


def test_one_thread_reads_while_the_source_is_slow() -> None:
    slow = [True]
    work = claims(4, reading=2, alone=100, is_slow=lambda: slow[0])
    assert work.take() is not None
    wrote = work.counted(lambda _: None)
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(work.take)
        wrote(200)
        time.sleep(0.05)
        assert not second.done()
        slow[0] = False
        wrote(1)
        assert second.result(timeout=10) is not None


def test_a_first_shard_that_is_smaller_than_a_part_does_not_hold_up_the_others() -> None:
    work = claims(3, reading=2, alone=100)
    for _ in range(3):
        assert work.take() is not None
        work.counted(lambda _: None)(10)
        work.written()
    assert work.take() is None


def test_nobody_waits_for_a_place_when_the_run_is_over() -> None:
    stop = threading.Event()
    work = claims(4, reading=1, stop=stop)
    assert work.take() is not None
    with ThreadPoolExecutor(1) as pool:
        second = pool.submit(work.take)
        stop.set()
        assert second.result(timeout=10) is None
