"""The program as a whole: help, wrong usage, a process of its own, and what it imports."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Run
from support.model import Model


def test_the_module_runs_in_a_process_of_its_own(tmp_path: Path) -> None:
    folder = Model().write(tmp_path / "model")
    done = subprocess.run(
        [sys.executable, "-m", "quarkconv", "inspect", str(folder), "--json"], capture_output=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, b"")
    assert json.loads(done.stdout)["scheme"] == "ptpc_int8"


def test_the_bare_command_shows_help() -> None:
    done = subprocess.run([sys.executable, "-m", "quarkconv"], capture_output=True, text=True, check=False)
    assert done.returncode == 0
    assert done.stdout.startswith("Usage: ")
    assert "\n" in done.stdout.strip()


@pytest.mark.parametrize(("given", "expected"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_threads_of_torch_sleep_while_they_wait_unless_the_user_decides_otherwise(
    given: dict[str, str], expected: str
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"} | given
    code = (
        "import os, sys; from quarkconv.cli import main; "
        "main.main = lambda: (print(os.environ['OMP_WAIT_POLICY'], 'torch' in sys.modules), sys.exit(0)); main.run()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, text=True, env=environment)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{expected} False\n", "")


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["a", "b"], ["--layers", "1"]])
def test_wrong_usage_exits_2(arguments: list[str], command: Run) -> None:
    result = command("inspect", *arguments)
    assert (result.code, result.out) == (2, "")
    assert "run `quarkconv inspect --help`" in result.err
    assert command("inspect", *arguments, "--json").json["exit_code"] == 2


@pytest.mark.parametrize(
    ("url", "hint"),
    [
        ("https://huggingface.co/org/name/tree/main", "give the repo id: org/name"),
        ("hf://org/name", "give the repo id: org/name"),
        ("https://huggingface.co/datasets/org/name", "download the model, and give its directory"),
        ("https://example.com/model.safetensors", "download the model, and give its directory"),
    ],
)
def test_a_url_that_models_are_not_read_from_is_refused(url: str, hint: str, command: Run) -> None:
    error = command("inspect", url, "--json").json
    assert (error["exit_code"], error["hint"]) == (2, hint)


def test_an_output_at_a_url_that_is_not_written_to_is_refused(tmp_path: Path, command: Run) -> None:
    folder = Model().write(tmp_path / "model")
    error = command("convert", folder, "--to", "fused-int8", "--out", "https://example.com/model", "--json").json
    assert (error["exit_code"], error["file"]) == (2, "https://example.com/model")


@pytest.mark.parametrize("words", [["inspect"], ["verify"], ["evaluate", "--text", "text.txt"], ["merge"]])
def test_a_report_that_cannot_be_written_is_refused_before_anything_is_read(
    words: list[str], tmp_path: Path, command: Run
) -> None:
    error = command(*words, tmp_path / "nothing", "--report", tmp_path / "none" / "report.html", "--json").json
    assert (error["exit_code"], error["file"]) == (5, str(tmp_path / "none" / "report.html"))


def test_inspecting_imports_neither_torch_nor_triton(tmp_path: Path) -> None:
    folder = Model().write(tmp_path / "model")
    code = (
        "import sys, quarkconv; quarkconv.inspect_checkpoint(sys.argv[1], deep=True); "
        "print(*{'torch', 'triton', 'numpy', 'transformers'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, check=False, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "\n", "")
