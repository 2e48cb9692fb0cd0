"""Interrupted: it stops soon, says so, and the same command goes on."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest
from support.conversions import arguments, assert_unfinished, convert, start_slow
from support.program import PROCESS_TIMEOUT, snapshot


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("jobs", [1, 3])
def test_an_interrupt_stops_soon_and_the_work_resumes(
    source: Path, reference: dict[str, str], tmp_path: Path, number: signal.Signals, jobs: int
) -> None:
    out = tmp_path / "out"
    process = start_slow("pwrite", *arguments(source, out, jobs))
    began = time.monotonic()
    process.send_signal(number)
    text, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert time.monotonic() - began < 3  # of half a minute; it takes a fraction of a second
    assert process.returncode == 130
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert text == ""
    assert_unfinished(out)
    assert snapshot(convert(source, out)) == reference


def test_an_interrupt_before_the_first_write_is_reported_too(source: Path, tmp_path: Path) -> None:
    process = start_slow("preadv", *arguments(source, tmp_path / "out"), "--json")  # zero points are being read
    process.send_signal(signal.SIGINT)
    text, err = process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == 130
    assert json.loads(text)["exit_code"] == 130
    assert "Interrupted" in err
    assert "Traceback" not in err
    assert not (tmp_path / "out").exists()
