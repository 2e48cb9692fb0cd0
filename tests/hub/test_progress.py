"""Whatever takes longer than a second shows on a terminal how far it is, and nowhere else."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import HfApi
from huggingface_hub.utils import are_progress_bars_disabled  # type: ignore[attr-defined]
from support.checkpoints import make_checkpoint
from support.hub_state import Hub
from support.program import run_cli
from support.progress import Recorder
from support.terminal import CONTROL, Shown, run_on_terminal

import quarkconv
from quarkconv.cli import progress as progress_module

pytestmark = pytest.mark.long(20)

REPO = "org/tiny-moe"
Run = Callable[..., Shown]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", experts=4, hidden=128, intermediate=96, shards=5)


@pytest.fixture
def slow(hub: Hub, model: Path) -> Hub:
    """A Hub that thinks about each answer."""
    hub.publish(REPO, model)
    hub.faults.delay = 0.12
    return hub


@pytest.fixture
def run(slow: Hub, tmp_path: Path) -> Run:
    """The program, with the slow Hub as its Hub."""

    def invoke(*arguments: str | Path, **options: object) -> Shown:
        extra = options.pop("environment", {})
        assert isinstance(extra, dict)
        environment = {
            "HF_ENDPOINT": f"{slow.url}/", "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_TELEMETRY": "1",
            "COLUMNS": "100", **extra,
        }  # fmt: skip
        return run_on_terminal(*arguments, environment=environment, **options)  # type: ignore[arg-type]

    return invoke


def test_inspect_shows_what_it_reads_and_leaves_nothing_behind(run: Run) -> None:
    shown = run("inspect", REPO, "--deep", "--json")
    assert shown.code == 0
    assert json.loads(shown.out)["model"] == REPO, "standard output has the answer and nothing else"
    text = "\n".join(shown.lines)
    assert "Contacting the Hub" in text
    assert re.search(r"Reading headers .* [0-4] of 5 shards", text)
    assert re.search(r"Reading scales .* of [\d.]+ kB", text)
    assert shown.terminal.rindex("\x1b[?25h") > shown.terminal.rindex("\x1b[?25l"), "the cursor is shown again"
    assert shown.terminal.endswith("\x1b[2K"), "the last line is empty again"


@pytest.mark.parametrize(
    ("arguments", "options"),
    [
        (["--quiet"], {}), (["-q", "--json"], {}), ([], {"stderr": False}),
        ([], {"stderr": False, "environment": {"FORCE_COLOR": "1", "TTY_COMPATIBLE": "1"}}),
        ([], {"environment": {"TERM": "dumb"}}), ([], {"delay": 30}),
    ],
)  # fmt: skip
def test_nothing_is_shown_unasked(run: Run, arguments: list[str], options: dict[str, object]) -> None:
    shown = run("inspect", REPO, *arguments, **options)
    assert shown.code == 0
    assert shown.out
    assert shown.lines == []


def test_a_terminal_without_colours_and_with_few_columns_gets_neither(run: Run) -> None:
    shown = run("inspect", REPO, environment={"NO_COLOR": "1", "COLUMNS": "50"})
    assert any("Reading headers" in line for line in shown.lines)
    assert not re.search(r"\x1b\[[\d;]*(3|4|9|10)\d", shown.terminal), "a colour"
    assert max(map(len, shown.lines)) <= 50
    assert max(map(len, shown.out.splitlines())) <= 50


def test_convert_shows_planning_and_then_converting(run: Run, tmp_path: Path) -> None:
    shown = run("convert", REPO, "--to", "fused-int8", "--out", tmp_path / "out", "--jobs", "1")
    assert shown.code == 0
    text = "\n".join(shown.lines)
    assert re.search(r"Reading headers .* of 5 shards", text)
    assert re.search(r"Converting to fused-int8 .* of \d+ kB", text)
    assert "Converted to fused-int8" in shown.out


@pytest.mark.parametrize("xet", [False, True])
def test_downloads_are_shown_in_the_same_way(run: Run, slow: Hub, tmp_path: Path, xet: bool) -> None:
    slow.xet = xet
    total = sum(len(file.data) for file in slow.files(REPO).values())
    command = ["convert", REPO, "--to", "fused-int8", "--dry-run", "--json", "--cache"]
    shown = run(*command)
    assert shown.code == 0
    assert json.loads(shown.out)["dry_run"] is True
    text = "\n".join(shown.lines)
    assert re.search(rf"Downloading .* of {total / 1000:.0f} kB", text)
    assert "Fetching" not in text, "a bar of huggingface_hub"
    assert "it/s" not in text
    again = run(*command)  # everything is there
    assert not [line for line in again.lines if re.search(r"Downloading .* of [1-9]", line)]
    piped = run(*command, stderr=False, environment={"HF_HOME": str(tmp_path / "another")})
    assert (piped.code, piped.terminal) == (0, "")


def test_verify_shows_the_download_and_then_what_it_checks(run: Run, slow: Hub, model: Path, tmp_path: Path) -> None:
    slow.publish("org/converted", quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out").output)
    shown = run("verify", "org/converted", "--tokens", "2", "--device", "cpu", "--json")
    assert (shown.code, json.loads(shown.out)["ok"]) == (0, True)
    text = "\n".join(shown.lines)
    assert "Starting" in text
    assert re.search(r"Downloading .* of [\d.]+ kB", text)
    assert re.search(r"layer 0 \(model\.layers\.0\b.*\): ok in", text)


def test_an_error_comes_after_what_was_shown(run: Run, slow: Hub) -> None:
    slow.faults.lie = "shifted"
    shown = run("inspect", REPO)
    assert shown.code == 3
    assert shown.out == ""
    assert any("Reading headers" in line for line in shown.lines)
    after = CONTROL.sub("", shown.terminal.rpartition("\x1b[?25h")[2])
    assert "error: The Hub sent the wrong bytes" in after
    assert "Reading" not in after


def test_an_interrupt_gives_the_terminal_back(run: Run, slow: Hub) -> None:
    slow.faults.delay = 2  # on a busy machine, the interrupt takes a while to arrive
    shown = run("inspect", REPO, interrupt_at="Contacting the Hub")
    assert shown.code == 130
    assert shown.terminal.rindex("\x1b[?25h") > shown.terminal.rindex("\x1b[?25l")
    assert "Interrupted" in shown.terminal


def test_verbose_shows_commits_and_requests(run: Run, slow: Hub) -> None:
    slow.faults.delay = 0
    shown = run("inspect", REPO, "-v", stderr=False)
    commit = slow.refs[REPO]["main"]
    assert f"{REPO} is commit {commit}: 7 files" in shown.terminal
    assert re.search(rf"{REPO}@{commit}: \d+ bytes read in \d+ requests", shown.terminal)


def test_retries_are_shown_with_verbose_only(run: Run, slow: Hub) -> None:
    slow.faults.delay, slow.faults.server_errors = 0, 1
    assert run("inspect", REPO, stderr=False).terminal == ""
    slow.faults.server_errors = 1
    assert "503" in run("inspect", REPO, "-v", stderr=False).terminal


@pytest.mark.usefixtures("hub")
def test_a_local_model_that_reads_at_once_imports_nothing_to_show(model: Path) -> None:
    shown = run_on_terminal(
        "inspect", model, "--json", delay=30, environment={"PYTHONPROFILEIMPORTTIME": "1"}, stderr=True
    )
    assert shown.code == 0
    imported = {line.rpartition("|")[2].strip() for line in shown.lines}
    assert "quarkconv.cli.progress" in imported
    assert not [name for name in imported if name.split(".")[0] in ("rich", "logging", "huggingface_hub")]


def test_reading_reports_its_progress(hub: Hub, model: Path) -> None:
    hub.publish(REPO, model)
    remote, local = Recorder(), Recorder()
    quarkconv.inspect_checkpoint(REPO, deep=True, progress=remote)
    quarkconv.inspect_checkpoint(model, deep=True, progress=local)
    assert [step.name for step in remote.steps] == ["Contacting the Hub", "Reading headers", "Reading scales"]
    assert [step.name for step in local.steps] == ["Reading headers", "Reading scales"]
    for recorder in (remote, local):
        headers, scales = recorder.steps[-2:]
        assert (headers.total, headers.unit, headers.advances) == (5, "shard", [1] * 5)
        assert scales.unit == "byte"
        assert sum(scales.advances) == scales.total


def test_headers_that_are_longer_than_the_first_guess_count_once(
    hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quarkconv.headers.remote.FIRST_GUESS", 600)
    hub.publish(REPO, model)
    recorder = Recorder()
    quarkconv.plan_conversion(REPO, "fused-int8", progress=recorder)
    assert [step.advances for step in recorder.named("Reading headers")] == [[1] * 5]


def test_uploads_show_no_bars_where_nothing_is_to_be_shown(
    hub: Hub, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bars = sys.modules["huggingface_hub.utils.tqdm"]
    monkeypatch.setattr(bars, "HF_HUB_DISABLE_PROGRESS_BARS", None)
    seen: list[bool] = []
    upload = HfApi.upload_folder

    def watched(self: HfApi, **options: Any) -> object:
        seen.append(are_progress_bars_disabled())
        return upload(self, **options)

    monkeypatch.setattr(HfApi, "upload_folder", watched)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    code, _, err = run_cli(capsys, "convert", model, "--to", "bf16", "--out", tmp_path / "out", "--push", "user/x")
    assert (code, err) == (0, "")
    assert seen == [True]
    assert not are_progress_bars_disabled()
    assert hub.files("user/x")


def test_a_meter_shows_the_last_step() -> None:
    with progress_module.progress("Reading", shown=False) as meter:
        meter.step("Converting", 10_000, "byte")
        meter.advance(1500)
        step, done = meter.state()
    assert progress_module._amount(step, done) == "1.5 kB of 10 kB"
    assert progress_module._rate(step, 2_345_678.9) == "2.35 MB/s"
    meter.advance(9000)  # more than was announced: the total of a download may grow
    assert progress_module._amount(*meter.state()) == "10.5 kB of 10.5 kB"
    meter.step("Reading headers", 48, "shard")
    meter.advance(3)
    assert progress_module._amount(*meter.state()) == "3 of 48 shards"
    assert progress_module._rate(meter.state()[0], 2.345) == "2.3/s"
    meter.step("Contacting the Hub")
    assert progress_module._amount(*meter.state()) == ""
