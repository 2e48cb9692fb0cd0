"""The output of commands: one JSON object or text for people on stdout, all else on stderr, on any terminal."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.commands import HOSTILE, Run, assert_harmless
from support.model import Model
from support.quark_config import WEIGHT, layer_config
from support.raw import raw_file

from quarkconv import SourceError, inspect_checkpoint
from quarkconv.cli.out import Output, open_output, plain, printable, show_error
from quarkconv.errors import HubError, UsageError


@pytest.fixture
def run(command: Run) -> Run:
    """Run ``quarkconv inspect`` in this process."""
    return lambda *arguments: command("inspect", *arguments)


# Modes


def test_in_json_mode_nothing_is_rendered(capsys: pytest.CaptureFixture[str]) -> None:
    Output(json=True).show({"name": "\u00e9", "layers": [0]}, lambda: pytest.fail("rendered"))
    assert capsys.readouterr().out == '{"name": "\\u00e9", "layers": [0]}\n'


def test_for_people_the_value_is_not_printed(capsys: pytest.CaptureFixture[str]) -> None:
    Output().show({"name": "value"}, lambda: "for people")
    assert capsys.readouterr().out == "for people\n"


def test_a_number_that_json_lacks_is_refused() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        Output(json=True).show({"error": float("nan")}, lambda: "")


@pytest.mark.parametrize(
    ("quiet", "terminal", "shown"), [(False, True, True), (True, True, False), (False, False, False)]
)
def test_progress_is_shown_on_a_terminal_unless_quiet(
    quiet: bool, terminal: bool, shown: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal)
    assert open_output(quiet=quiet).shows_progress is shown


def test_an_error_has_its_details_on_stderr_and_with_json_on_stdout_too(capsys: pytest.CaptureFixture[str]) -> None:
    error = HubError("The Hub refused", file="org/name", expected="a token", found="401", hint="hf auth login")
    show_error(error, as_json=False)
    out, err = capsys.readouterr()
    lines = ["error: The Hub refused", "  file:     org/name", "  expected: a token", "  found:    401"]
    assert (out, err.splitlines()) == ("", [*lines, "  hint:     hf auth login"])
    show_error(error, as_json=True)
    out, again = capsys.readouterr()
    assert again == err
    assert json.loads(out) == {
        "schema": "quarkconv.error/1",
        "error": "The Hub refused",
        "exit_code": 3,
        "code": "hub-unavailable",
        "file": "org/name",
        "expected": "a token",
        "found": "401",
        "hint": "hf auth login",
    }


def test_an_error_without_a_code_has_null(capsys: pytest.CaptureFixture[str]) -> None:
    show_error(UsageError("Invalid size"), as_json=True)
    value = json.loads(capsys.readouterr().out)
    assert value == {"schema": "quarkconv.error/1", "error": "Invalid size", "exit_code": 2, "code": None}


@pytest.mark.parametrize(("text", "expected"), [("\u2713", "+"), ("\u2717\u221e", "xinf"), ("\u00e9", "?")])
def test_marks_are_replaced_where_the_encoding_lacks_them(text: str, expected: str) -> None:
    assert plain(UnicodeEncodeError("ascii", text, 0, len(text), "ordinal not in range")) == (expected, len(text))


def test_control_characters_are_escaped() -> None:
    assert printable("a\x1b[31m\n\u202eb") == "a\\x1b[31m\\n\\u202eb"


# Names that try to control the terminal


def test_names_of_tensors_cannot_drive_the_terminal(tmp_path: Path, run: Run) -> None:
    model = Model()
    model.set(f"model.{HOSTILE}", torch.zeros(1, dtype=torch.int8))
    folder = model.write(tmp_path)
    result = run(folder)
    assert_harmless(result.out)
    assert "[/]" in result.out
    assert run(folder, "--json").json["findings"][0]["subject"] == f"model.{HOSTILE}"
    assert run(folder, "--json").out.strip().isprintable()


def test_strings_of_the_config_cannot_drive_the_terminal(tmp_path: Path, run: Run) -> None:
    model = Model()
    model.config["model_type"] = HOSTILE
    model.quantization["version"] = HOSTILE
    model.quantization["exclude"] = [HOSTILE]
    model.quantization["global_quant_config"] = layer_config(
        {**WEIGHT, "dtype": HOSTILE, "qscheme": "[/bold]"}, {**WEIGHT, "qscheme": HOSTILE}
    )
    result = run(model.write(tmp_path))
    assert result.code == 1
    assert_harmless(result.out)
    assert "[/bold]" in result.out


def test_half_a_surrogate_pair_can_be_printed(tmp_path: Path, run: Run) -> None:
    model = Model()
    model.config["model_type"] = "\ud800"
    folder = model.write(tmp_path)
    assert "\\ud800" in run(folder).out
    assert run(folder, "--json").code == 0


def test_names_of_files_cannot_drive_the_terminal(tmp_path: Path, run: Run) -> None:
    folder = Model().write(tmp_path)
    (folder / "\x1b[31m.safetensors").write_bytes(raw_file("{}"))
    result = run(folder)
    assert "file-unused" in result.out
    assert_harmless(result.out)


def test_the_name_of_a_missing_model_cannot_drive_the_terminal(tmp_path: Path, run: Run) -> None:
    path = tmp_path / "\x1b[31mmissing"
    result = run(path)
    assert (result.code, result.out) == (3, "")
    assert_harmless(result.err)
    assert "Traceback" not in result.err
    value = run(path, "--json").json
    assert (value["exit_code"], value["file"]) == (3, str(path))
    with pytest.raises(SourceError):
        inspect_checkpoint(path)


# Standard output that goes away


@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_a_closed_pipe_is_not_a_finding(arguments: list[str], checkpoints: Callable[[str], Path]) -> None:
    command = [sys.executable, "-m", "quarkconv", "inspect", str(checkpoints("qwen3_moe-quark0.13-f2f")), *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    _, err = process.communicate()
    assert (process.returncode, err) == (141, b"")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@pytest.mark.parametrize("arguments", [[], ["--json"]])
def test_standard_output_that_is_full_is_a_write_error(
    arguments: list[str], checkpoints: Callable[[str], Path]
) -> None:
    command = [sys.executable, "-m", "quarkconv", "inspect", str(checkpoints("qwen3_moe-quark0.13-f2f")), *arguments]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True, check=False)
    assert done.returncode == 5
    assert "No space left" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_terminal_that_knows_only_ascii_is_served(checkpoints: Callable[[str], Path]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quarkconv", "inspect", str(checkpoints("qwen3_moe-quark0.13-f2f"))],
        capture_output=True, check=False, env={**os.environ, "PYTHONIOENCODING": "ascii"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"\n+ Config and tensors agree: ptpc_int8, 3 MoE layers of 8 experts\n" in done.stdout
