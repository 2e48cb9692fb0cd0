"""Progress on stderr: its figures, and when it is shown."""

from __future__ import annotations

import re
import threading
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.terminal import run_on_terminal

from quarkconv.cli import progress as module
from quarkconv.cli.progress import Meter, progress


def test_a_meter_counts_each_step_anew() -> None:
    meter = Meter("Starting")
    meter.advance(3)
    assert meter.state() == (("Starting", None, ""), 3)
    meter.step("Reading headers", 10, "shard")
    meter.advance()
    meter.advance(2)
    assert meter.state() == (("Reading headers", 10, "shard"), 3)


def test_a_meter_counts_what_several_threads_do() -> None:
    meter = Meter("Converting")

    def work() -> None:
        for _ in range(5000):
            meter.advance(2)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert meter.state()[1] == 4 * 5000 * 2


@pytest.mark.parametrize(
    ("total", "unit", "done", "amount"),
    [
        (None, "", 7, ""),
        (5, "shard", 2, "2 of 5 shards"),
        (1, "layer", 0, "0 of 1 layer"),
        (2000, "byte", 500, "500 B of 2 kB"),
        (5, "shard", 6, "6 of 6 shards"),  # more than planned: the total follows
    ],
)
def test_amounts_are_shown_in_their_unit(total: int | None, unit: str, done: int, amount: str) -> None:
    meter = Meter("step")
    meter.step("step", total, unit)
    assert module._amount(meter.state()[0], done) == amount


@pytest.mark.parametrize(("unit", "rate"), [("byte", "1.5 MB/s"), ("shard", "1500000.0/s")])
def test_rates_are_shown_in_their_unit(unit: str, rate: str) -> None:
    meter = Meter("step")
    meter.step("step", 10, unit)
    assert module._rate(meter.state()[0], 1.5e6) == rate


def test_a_hidden_meter_starts_no_thread(capsys: pytest.CaptureFixture[str]) -> None:
    before = threading.active_count()
    with progress("Reading", shown=False) as meter:
        assert threading.active_count() == before
        meter.note("a note")
    assert capsys.readouterr() == ("", "")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("progress") / "model", layers=2)


def test_notes_and_bars_appear_on_a_terminal(model: Path) -> None:
    shown = run_on_terminal("verify", model, "--device", "cpu", "--tokens", "2", delay=0.0, environment={})
    assert shown.code == 0, shown.terminal
    assert any(re.match(r"\W*Starting", line) for line in shown.lines)
    assert [line for line in shown.lines if "layer 0 (" in line and ": ok in" in line]
    assert "Starting" not in shown.out


@pytest.mark.parametrize(("quiet", "terminal"), [(True, True), (False, False)])
def test_nothing_appears_with_quiet_or_without_a_terminal(model: Path, quiet: bool, terminal: bool) -> None:
    options = ["--quiet"] if quiet else []
    shown = run_on_terminal("inspect", model, *options, delay=0.0, stderr=terminal, environment={})
    assert shown.code == 0
    assert shown.lines == []


def test_a_short_command_shows_nothing(model: Path) -> None:
    shown = run_on_terminal("inspect", model, delay=30, environment={})
    assert (shown.code, shown.lines) == (0, [])
