"""Wrong and odd command lines: one clear message, the exit code of its kind, and nothing lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.commands import Run
from support.exports import Checkpoints, Converted
from support.model import Model
from support.program import snapshot

NAME = "qwen3_moe-quark0.13-f2f"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Model().write(tmp_path / "model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", ""], "The name of a model is empty"),
        (["convert", "", "--to", "bf16"], "The name of a model is empty"),
        (["convert", "MODEL", "--to", "bf16", "--out", ""], "--out is empty"),
        (["inspect", "MODEL", "--report", ""], "--report is empty"),
        (["inspect", "s3://"], "Invalid URL of an object store"),
        (["inspect", "s3:///path"], "Invalid URL of an object store"),
        (["convert", "MODEL", "--to", "bf16", "--out", "s3://"], "The output needs a path in the bucket"),
        (["uploads", "s3://"], "Invalid URL"),
        (["uploads", "a/folder"], "Invalid URL"),
        (["verify", "MODEL", "--bytes-only", "--unquantized", "x"], "--unquantized has no effect with --bytes-only"),
        (["verify", "MODEL", "--bytes-only", "--activations", "x"], "--activations has no effect with --bytes-only"),
        (["convert", "MODEL", "--to", "bf16", "--scheme", "ptpc_int8"], "--scheme is for int8 weights whose scheme"),
        (["tune", "--shape", "8,9,128,96"], "Invalid --shape"),
        (["tune", "--shape", "large"], "Invalid --shape"),
    ],
)
def test_wrong_usage_exits_2_and_writes_nothing(
    words: list[str], message: str, model: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    before = snapshot(model.parent)
    result = command(*[str(model) if word == "MODEL" else word for word in words])
    assert (result.code, result.out) == (2, "")
    assert message in result.err
    assert snapshot(model.parent) == before


@pytest.mark.parametrize("words", [("engines",), ("engines", "--json")])
def test_every_command_takes_quiet_and_verbose(words: tuple[str, ...], command: Run) -> None:
    plain = command(*words)
    assert plain.code == 0
    assert [command(*words, option).out for option in ("-q", "-v")] == [plain.out, plain.out]
    for name in ("merge", "uploads"):
        assert {"--quiet", "--verbose"} <= set(command(name, "--help").out.split())


@pytest.mark.parametrize("option", ["--report", "--record"])
def test_no_file_of_the_model_is_replaced(option: str, model: Path, command: Run) -> None:
    before = snapshot(model)
    name = "inspect" if option == "--report" else "evaluate"
    more = [] if option == "--report" else ["--text", model / "config.json"]
    for file in ("config.json", *(path.name for path in model.glob("*.safetensors"))):
        result = command(name, model, *more, option, model / file)
        assert result.code == 2
        assert f"{option} would replace another file" in result.err
    assert snapshot(model) == before


@pytest.mark.parametrize("inside", ["", "folder"])
def test_an_output_behind_a_loop_of_links_cannot_be_written(
    inside: str, model: Path, tmp_path: Path, command: Run
) -> None:
    (tmp_path / "one").symlink_to("two")
    (tmp_path / "two").symlink_to("one")
    result = command("convert", model, "--to", "bf16", "--out", tmp_path / "one" / inside)
    assert (result.code, result.out) == (5, "")
    assert "Writing failed" in result.err


def test_a_directory_that_cannot_be_searched_is_a_source_that_cannot_be_read(
    model: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tests may run as root, whom no permission stops: the system call refuses instead."""
    scandir = os.scandir

    def refusing(path: str | os.PathLike[str]) -> object:
        if os.fspath(path) == str(model):
            raise PermissionError(13, "Permission denied", str(model))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    for words in (["inspect", model], ["convert", model, "--to", "bf16"], ["verify", model]):
        result = command(*words)
        assert (result.code, result.out) == (3, "")
        assert "The model directory cannot be read" in result.err
        assert "found:    Permission denied" in result.err


@pytest.mark.parametrize(
    ("error", "hint"),
    [
        (PermissionError(13, "Permission denied"), "check who may read"),
        (OSError(5, "I/O error"), "copy the checkpoint"),
    ],
)
def test_a_config_without_permission_is_not_to_be_downloaded_again(
    error: OSError, hint: str, model: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusing(*_: object) -> bytes:
        raise error

    monkeypatch.setattr("quarkconv.files.json_files.read_regular", refusing)
    result = command("inspect", model, "--json")
    assert result.code == 1
    (found,) = [item for item in result.json["findings"] if item["code"] == "config-invalid"]
    assert hint in found["hint"]


def test_a_current_directory_that_was_deleted_is_named(model: Path, tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    def run(*words: str) -> tuple[int, str]:
        gone.mkdir()
        code = f"import os, sys; os.rmdir({str(gone)!r}); from quarkconv.cli.main import run; run()"
        done = subprocess.run(
            [sys.executable, "-P", "-c", code, *words], cwd=gone, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stderr

    code, err = run("inspect")
    assert (code, err.splitlines()[0]) == (3, "error: The model directory cannot be read")
    code, err = run("convert", str(model), "--to", "bf16", "--out", "out")
    assert (code, err.splitlines()[0]) == (2, "error: The current directory does not exist")


def test_a_reader_of_the_help_that_has_exited_is_no_finding() -> None:
    code = "import sys; from quarkconv.cli.main import run; run()"
    process = subprocess.Popen([sys.executable, "-c", code, "inspect", "--help"], stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.close()
    assert process.wait() == 141


@pytest.mark.parametrize(("option", "name"), [("--source", NAME), ("--unquantized", "qwen3_moe-bf16")])
def test_a_damaged_model_to_compare_with_cannot_be_read(
    option: str, name: str, checkpoints: Checkpoints, converted: Converted, tmp_path: Path, command: Run
) -> None:
    """It was refused as another model, with a hint that led nowhere."""
    other = checkpoints.copy(name, tmp_path / "other")
    shard = sorted(other.glob("*.safetensors"))[2]
    with shard.open("r+b") as file:
        file.write(b"\xff" * 8)
    result = command("verify", converted(NAME), option, other, "--layers", "0", "--device", "cpu", "--json")
    assert result.code == 3
    assert result.json["code"] == "header-invalid"
    assert result.json["file"] == str(shard)
    assert "tensor" not in result.json


def test_an_interrupt_that_python_wraps_in_another_error_is_an_interrupt(
    command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An interrupt in ``__set_name__`` of a class becomes a RuntimeError: torch was being imported."""

    class Field:
        def __set_name__(self, owner: type, name: str) -> None:
            raise KeyboardInterrupt

    def interrupted(_: list[str]) -> None:
        type("Owner", (), {"field": Field()})

    monkeypatch.setattr("quarkconv.cli.program.run_command", interrupted)
    result = command("inspect", "--json")
    assert (result.code, result.err) == (130, "error: Interrupted\n")
    assert result.json["exit_code"] == 130


class OutOfMemoryError(RuntimeError):
    """As torch names that of a GPU."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "There is not enough memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee"), "Tried to allocate 20 GiB.\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "There is not enough memory"),
        (ImportError("libtorch_cpu.so: failed to map", name="_C", path="torch/_C.so"), "torch/_C.so"),
        (ModuleNotFoundError("No module named 'xxhash'", name="xxhash"), "No module named 'xxhash'"),
    ],
)
def test_too_little_memory_and_a_broken_installation_are_named(
    error: Exception, message: str, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: list[str]) -> None:
        raise error

    monkeypatch.setattr("quarkconv.cli.program.run_command", failing)
    result = command("verify")
    assert (result.code, result.out) == (2, "")
    assert message in result.err


FAULTS = [RuntimeError("a fault"), ImportError("a circle", name="quarkconv.plan"), KeyError(1)]


@pytest.mark.parametrize("error", FAULTS)
def test_a_fault_of_the_program_keeps_its_traceback(
    error: Exception, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(_: list[str]) -> None:
        raise error

    monkeypatch.setattr("quarkconv.cli.program.run_command", failing)
    with pytest.raises(type(error)):
        command("verify")
