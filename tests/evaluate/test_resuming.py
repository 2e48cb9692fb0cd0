"""Evaluations that are interrupted or killed, and the state that they resume from."""

from __future__ import annotations

import errno
import os
import shutil
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from support.program import PROCESS_TIMEOUT, start

from quarkconv import WriteError, evaluate_checkpoint
from quarkconv.evaluate import run
from quarkconv.evaluate import state as state_module
from quarkconv.evaluate.hidden_states import Streams
from quarkconv.evaluate.run import Run
from quarkconv.evaluate.state import EvaluationState

pytestmark = pytest.mark.long(10)


def test_an_interrupted_run_resumes_after_its_last_layer(
    quantized: Path, unquantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu")
    run_layer = Run._layer
    ran: list[int] = []

    def stops(self: Run, number: int, *rest: Any) -> None:
        if number == 2 and 2 not in ran:
            ran.append(2)
            raise KeyboardInterrupt
        ran.append(number)
        run_layer(self, number, *rest)

    monkeypatch.setattr(Run, "_layer", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu")
    assert ran == [0, 1, 2]
    again = evaluate_checkpoint(quantized, unquantized, token_ids=token_ids, device="cpu")
    assert ran == [0, 1, 2, 2, 3]
    assert again.to_json() == whole.to_json()


def test_a_run_that_records_begins_anew_after_an_interrupt(
    quantized: Path, token_ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_layer = Run._layer

    def stops(self: Run, number: int, *rest: Any) -> None:
        if number == 2:
            raise KeyboardInterrupt
        run_layer(self, number, *rest)

    record = tmp_path / "inputs.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_layer", stops)
        with pytest.raises(KeyboardInterrupt):
            evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", record=record)
    evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", record=record)
    assert len(load_file(record)) == 4


def test_layers_do_not_wait_for_a_slow_disk(quantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    save, run_layer, last = EvaluationState.save, Run._layer, threading.Event()

    def slow(self: EvaluationState, streams: Streams) -> None:
        assert last.wait(60)
        saved.append(streams.finished)
        save(self, streams)

    def running(self: Run, number: int, *rest: Any) -> None:
        run_layer(self, number, *rest)
        if number == 3:
            last.set()

    monkeypatch.setattr(run, "_PATIENCE", 0.0)
    monkeypatch.setattr(EvaluationState, "save", slow)
    monkeypatch.setattr(Run, "_layer", running)
    found = evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu")
    assert saved in ([1], [1, 4])
    monkeypatch.undo()
    assert found.to_json() == evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", resume=False).to_json()


def test_a_full_disk_is_an_error_of_writing(quantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(state_module, "_write", full)
    with pytest.raises(WriteError, match="hidden states cannot be written") as caught:
        evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu")
    assert "No space left" in str(caught.value.found)
    assert caught.value.exit_code == 5


def test_a_disk_that_is_too_full_is_refused_before_the_first_layer(
    quantized: Path, token_ids: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both variants of five windows of 24 tokens of 128 numbers in 16 bits, once beside the ones before."""
    needed = 2 * 2 * 5 * 24 * 128 * 2
    usage = shutil.disk_usage("/")
    free = [needed - 1, needed]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=free.pop(0)))
    with monkeypatch.context() as patch:
        patch.setattr(Run, "_layer", lambda *_: pytest.fail("a layer ran"))
        with pytest.raises(WriteError, match="too full") as caught:
            evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu")
    assert caught.value.exit_code == 5
    evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu")


KILLED_IN_THE_SECOND_LAYER = """
import os, signal, sys
from quarkconv.cli.main import main
from quarkconv.evaluate.state import EvaluationState

save, calls = EvaluationState.save, 0

def save_once(self, streams):
    global calls
    calls += 1
    if calls == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    save(self, streams)

EvaluationState.save = save_once
main(sys.argv[1:])
"""
"""Kills itself when the second layer has run, before that is kept."""


@pytest.mark.parametrize(
    ("words", "options", "layers_run"),
    [
        ((), {}, [1, 2, 3]),
        (("--ablate", "1", "--layers", "1,3"), {"ablate": 1, "layers": {1, 3}}, [1, 2, 3, 0, 1, 2, 3]),
    ],
    ids=["plain", "ablate and layers"],
)
def test_a_killed_run_resumes_from_its_last_finished_layer(
    words: tuple[str, ...],
    options: dict[str, Any],
    layers_run: list[int],
    quantized: Path,
    token_ids: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more: list[str | Path] = ["--token-ids", token_ids, "--batch", "1", "--device", "cpu", "--json", *words]
    process = start(KILLED_IN_THE_SECOND_LAYER, "evaluate", quantized, *more)
    process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == -signal.SIGKILL
    assert list((tmp_path / "cache" / "quarkconv" / "evaluate").glob("*.safetensors"))
    ran: list[int] = []
    run_layer = Run._layer

    def counted(self: Run, number: int, *rest: Any) -> None:
        ran.append(number)
        run_layer(self, number, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(Run, "_layer", counted)
        resumed = evaluate_checkpoint(quantized, token_ids=token_ids, batch=1, device="cpu", **options)
    assert ran == layers_run
    whole = evaluate_checkpoint(quantized, token_ids=token_ids, batch=1, device="cpu", resume=False, **options)
    assert resumed.to_json() == whole.to_json()


def test_a_killed_run_that_records_leaves_no_record_and_is_repeated(
    quantized: Path, token_ids: Path, tmp_path: Path
) -> None:
    record, expected = tmp_path / "record" / "inputs.safetensors", tmp_path / "expected.safetensors"
    record.parent.mkdir()
    words: list[str | Path] = ["--token-ids", token_ids, "--batch", "1", "--device", "cpu", "--record", record]
    process = start(KILLED_IN_THE_SECOND_LAYER, "evaluate", quantized, *words)
    process.communicate(timeout=PROCESS_TIMEOUT)
    assert process.returncode == -signal.SIGKILL
    assert not record.exists()
    for path in (record, expected):
        evaluate_checkpoint(quantized, token_ids=token_ids, batch=1, device="cpu", record=path)
    assert record.read_bytes() == expected.read_bytes()
    assert list(record.parent.iterdir()) == [record]


def test_nothing_is_kept_without_resuming(
    quantized: Path, token_ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stops(self: Run, states: Any) -> None:  # noqa: ARG001
        raise KeyboardInterrupt

    monkeypatch.setattr(Run, "scores", stops)
    with pytest.raises(KeyboardInterrupt):
        evaluate_checkpoint(quantized, token_ids=token_ids, device="cpu", resume=False)
    assert not list((tmp_path / "cache").rglob("*"))


def test_a_state_that_cannot_be_read_is_not_used(tmp_path: Path) -> None:
    state = EvaluationState("key", tmp_path)
    state.path.write_bytes(b"cut off")
    left, alive = (state.path.with_suffix(f".{number}") for number in (2**30, os.getpid()))
    left.write_bytes(b"of a process that was killed")
    alive.write_bytes(b"of one that is writing")
    assert state.load() is None
    assert (left.exists(), alive.exists()) == (False, True)
    state.remove()
