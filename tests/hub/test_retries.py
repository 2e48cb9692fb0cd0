"""The retry loop of all requests."""

from __future__ import annotations

from collections.abc import Iterator
from types import SimpleNamespace

import pytest

from quarkconv.files import http


class Flaky(Exception):  # noqa: N818
    """A transient error."""


def test_a_request_is_retried_until_it_succeeds(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr(http, "time", SimpleNamespace(sleep=waits.append))
    results: Iterator[Exception | int] = iter([Flaky(), Flaky(), 7])

    def request() -> int:
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    assert http.retried(request, lambda _, failures: http.backoff(failures)) == 7
    assert waits == [http.backoff(1), http.backoff(2)]


def test_an_error_without_a_pause_is_raised_at_once() -> None:
    def request() -> None:
        raise Flaky

    with pytest.raises(Flaky):
        http.retried(request, lambda *_: None)


def test_bytes_that_arrive_start_a_new_row_of_failures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "time", SimpleNamespace(sleep=lambda _: None))
    data = bytearray()
    rows: list[int] = []
    arrivals = iter([0, 3, 0, 0, 5])

    def request() -> None:
        arrived = next(arrivals)
        data.extend(bytes(arrived))
        if arrived != 5:
            raise Flaky

    def pause(_: Exception, failures: int) -> float:
        rows.append(failures)
        return 0.0

    http.retried(request, pause, lambda: len(data))
    assert rows == [1, 1, 2, 3]
