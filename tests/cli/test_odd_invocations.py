"""Wrong and odd command lines: one clear message, the exit code of its kind, and nothing lost."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

import pytest
from huggingface_hub.errors import OfflineModeIsEnabled
from support.checkpoints import Tensors, edit_checkpoint
from support.commands import Run
from support.exports import Checkpoints, Converted
from support.model import Model
from support.program import snapshot

from quarkconv.errors import HubError

NAME = "qwen3_moe-quark0.13-f2f"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Model().write(tmp_path / "model")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["inspect", ""], "The model name is empty"),
        (["convert", "MODEL"], "--to is missing"),
        (["convert", "", "--to", "bf16"], "The model name is empty"),
        (["convert", "MODEL", "--to", "bf16", "--out", ""], "--out is empty"),
        (["inspect", "MODEL", "--report", ""], "--report is empty"),
        (["inspect", "s3://"], "Invalid URL of an object store"),
        (["inspect", "s3:///path"], "Invalid URL of an object store"),
        (["convert", "MODEL", "--to", "bf16", "--out", "s3://"], "The output needs a path in the bucket"),
        (["uploads", "s3://"], "Invalid URL"),
        (["uploads", "a/folder"], "Invalid URL"),
        (["verify", "MODEL", "--bytes-only", "--unquantized", "x"], "--unquantized has no effect with --bytes-only"),
        (["verify", "MODEL", "--bytes-only", "--activations", "x"], "--activations has no effect with --bytes-only"),
        (["verify", "MODEL", "--bytes-only", "--layers", "0"], "--layers has no effect with --bytes-only"),
        (["verify", "MODEL", "--bytes-only", "--tokens", "64"], "--tokens has no effect with --bytes-only"),
        (["verify", "MODEL", "--bytes-only", "--seed", "0"], "--seed has no effect with --bytes-only"),
        (["convert", "MODEL", "--to", "bf16", "--max-shard-size", "5"], "Invalid --max-shard-size"),
        (["convert", "MODEL", "--to", "bf16", "--max-shard-size", "0"], "Invalid --max-shard-size"),
        (["convert", "MODEL", "--to", "bf16", "--part", "0/3"], "Invalid --part"),
        (["convert", "MODEL", "--to", "bf16", "--part", "1/3", "--overwrite"], "--part and --overwrite exclude"),
        (["convert", "MODEL", "--to", "quark", "--quantize", "all", "--exclude", "re:("], "Invalid --exclude"),
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
    assert "  hint:     " in result.err
    assert snapshot(model.parent) == before


@pytest.mark.parametrize(
    ("typed", "completed"),
    [
        (["verify", "--device", "c"], ["cpu", "cuda"]),
        (["convert", "--mtp", ""], ["keep", "drop", "quantize"]),
        (["convert", "--quantize", ""], ["missing", "all"]),
        (["convert", "--to", "b"], ["bf16"]),
        (["tune", "--for", "v"], ["vllm"]),
    ],
)
def test_the_shell_completes_the_values_of_options(typed: list[str], completed: list[str]) -> None:
    words = {"COMP_WORDS": " ".join(["quarkconv", *typed]), "COMP_CWORD": str(len(typed))}
    environment = {**os.environ, **words, "_QUARKCONV_COMPLETE": "complete_bash"}
    program = [sys.executable, "-c", "import sys; from quarkconv.cli.main import run; sys.argv = ['quarkconv']; run()"]
    done = subprocess.run(program, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.split() == completed


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
        assert f"{option} would overwrite an unrelated file" in result.err
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
        (PermissionError(13, "Permission denied"), "check its permissions"),
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


@pytest.mark.parametrize("seconds", [0.01, 60])
def test_an_interrupt_while_torch_imports_numpy_is_an_interrupt(tmp_path: Path, seconds: float) -> None:
    """torch took it for a missing numpy, and the command went on; or it ended before the interrupt was raised again."""
    numpy = tmp_path / "numpy.py"
    numpy.write_text(
        "import os, signal, sys\n"
        f"sys.path.remove({str(tmp_path)!r})\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "del sys.modules['numpy']\n"
        "import numpy\n"
    )
    code = (
        f"import signal, sys; sys.path.insert(0, {str(tmp_path)!r}); from quarkconv.cli import main\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # jobs in the background of a shell ignore it
        f"main._RETRY_SECONDS = {seconds}; main.run()"
    )
    words = [sys.executable, "-P", "-c", code, "verify", str(tmp_path / "nothing")]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (130, "error: Interrupted\n")


def test_a_report_that_fails_leaves_nothing_behind(
    model: Path, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("quarkconv.cli.reports.os.replace", full)
    result = command("inspect", model, "--report", tmp_path / "report.html")
    assert (result.code, result.out) == (5, "")
    assert "No space left on device" in result.err
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize(("option", "kept"), [((), True), (("--no-resume",), False)])
def test_an_interrupted_evaluation_says_whether_it_resumes(
    option: tuple[str, ...], kept: bool, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("quarkconv.evaluate.evaluation.evaluate_checkpoint", interrupted)
    result = command("evaluate", "model", "--text", "text.txt", *option)
    assert result.code == 130
    assert ("run the same command again: it resumes" in result.err) is kept


@pytest.mark.parametrize("width", ["40", "80"])
def test_a_command_to_copy_is_whole_in_any_terminal(
    width: str, model: Path, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It ended at the edge of the terminal, and of 80 columns in a pipe."""
    monkeypatch.setenv("COLUMNS", width)
    out = tmp_path / ("long-" * 20)
    printed = command("convert", model, "--to", "fused-int8", "--out", out).out
    assert f"prove it: quarkconv verify {out} --source {model}\n" in printed


def test_a_path_that_is_misspelt_is_not_only_looked_up_on_the_hub(
    model: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model.parent)
    for name, hint in (("org/name", "network"), ("model/other", "check the name: the directory model has no other")):
        error = HubError("The Hub cannot be reached", hint="network")
        monkeypatch.setattr("quarkconv.hub.locate._remote", raising(error))
        assert command("inspect", name, "--json").json["hint"] == hint


def test_an_upload_without_network_does_not_advise_a_login(
    model: Path, tmp_path: Path, command: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    offline = OfflineModeIsEnabled("offline mode is enabled")
    monkeypatch.setattr("huggingface_hub.HfApi.create_repo", raising(offline))
    words = ["convert", model, "--to", "bf16", "--out", tmp_path / "out", "--push", "org/name", "--json"]
    failed = command(*words)
    assert (failed.code, failed.json["hint"]) == (5, "unset HF_HUB_OFFLINE, then run the same command again")


def test_the_folder_of_tables_is_printed_as_json_too(command: Run) -> None:
    folder = command("tune", "--for", "vllm", "--print-folder").out.strip()
    assert list(Path(folder).glob("*.json"))
    printed = command("tune", "--for", "vllm", "--print-folder", "--json").json
    assert printed == {"schema": "quarkconv.tune/1", "engine": "vllm", "folder": folder}


def test_a_pointer_of_git_lfs_is_named(model: Path, command: Run) -> None:
    shard = min(model.glob("*.safetensors"))
    shard.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n")
    result = command("convert", model, "--to", "bf16", "--json")
    assert (result.code, result.json["file"]) == (3, str(shard))
    assert "Git LFS pointer" in result.json["error"]
    assert "git lfs pull" in result.json["hint"]


@pytest.mark.parametrize("words", [(), ("inspect",), ("convert",)])
def test_the_short_option_of_help_is_known(words: tuple[str, ...], command: Run) -> None:
    printed = command(*words, "-h")
    assert (printed.code, printed.out) == (0, command(*words, "--help").out)


@pytest.mark.parametrize(
    ("options", "words", "hint"),
    [
        (["--mtp", "quantize"], "Nothing to quantize", "convert without --mtp quantize"),
        (["--scheme", "ptpc_int8"], "--scheme declares int8, but nothing is stored in int8", "--quantize all"),
    ],
)
def test_an_option_that_finds_nothing_is_the_one_that_is_named(
    options: list[str], words: str, hint: str, checkpoints: Checkpoints, command: Run
) -> None:
    source = checkpoints(NAME if options[0] == "--mtp" else "qwen3_moe-bf16")
    failed = command("convert", source, "--to", "fused-int8", *options, "--dry-run", "--json")
    assert failed.code == 4
    assert words in failed.json["error"]
    assert hint in failed.json["hint"]


def test_a_shard_that_is_missing_does_not_exist(model: Path, command: Run) -> None:
    shard = min(model.glob("*.safetensors"))
    shard.unlink()
    (found,) = [item for item in command("inspect", model, "--json").json["findings"] if item["subject"] == shard.name]
    assert (found["code"], found["message"]) == ("shard-missing", "The file does not exist")
    assert found["hint"] == "download or copy the file again"


def test_files_of_a_model_are_named_by_their_paths(
    checkpoints: Checkpoints, converted: Converted, tmp_path: Path, command: Run
) -> None:
    """By their names alone, they could not be copied from the message."""
    source = checkpoints.copy(NAME, tmp_path / "source")

    def nan(tensors: Tensors) -> None:
        tensors["model.layers.0.mlp.experts.0.gate_proj.weight_scale"][0] = float("nan")

    edit_checkpoint(source, nan)
    failed = command("convert", source, "--to", "bf16", "--out", tmp_path / "out", "--json")
    assert (failed.code, failed.json["code"]) == (3, "scale-invalid")
    assert Path(failed.json["file"]).parent == source
    assert Path(failed.json["file"]).is_file()

    output = shutil.copytree(converted(NAME), tmp_path / "converted")
    (output / "quarkconv.json").write_text("{")
    failed = command("verify", output, "--json")
    assert (failed.code, failed.json["file"]) == (3, str(output / "quarkconv.json"))


class OutOfMemoryError(RuntimeError):
    """As torch names that of a GPU."""


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (MemoryError(), "Out of memory"),
        (OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nSee"), "Tried to allocate 20 GiB.\n"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory: 8 bytes"), "Out of memory"),
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


def raising(error: Exception) -> Callable[..., NoReturn]:
    def fail(*_: object, **__: object) -> NoReturn:
        raise error

    return fail


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
