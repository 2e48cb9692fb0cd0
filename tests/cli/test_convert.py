"""``quarkconv convert`` as a program: exit codes, what goes to stdout, and what to stderr."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import assert_same_tensors, edit_checkpoint, load, make_checkpoint
from support.expected import fused_int8
from support.exports import REFUSED, Checkpoints
from support.program import PROCESS_TIMEOUT, run_cli, snapshot

import quarkconv
from quarkconv.convert import conversion
from quarkconv.files.local import LocalFiles
from quarkconv.hub import locate as hub

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "tiny-moe", layers=2)


def test_the_output_lies_beside_the_model(model: Path, capsys: Capture) -> None:
    code, out, err = run_cli(capsys, "convert", model, "--to", "fused-int8")
    assert code == 0
    assert err == ""
    output = model.parent / "tiny-moe-fused-int8"
    assert_same_tensors(load(output), fused_int8(model))
    assert "Converted to fused-int8" in out
    assert "quarkconv verify" in out


def test_the_output_lies_beside_the_working_directory_that_is_the_model(
    model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(model)
    code, _, _ = run_cli(capsys, "convert", "--to", "fused-int8")
    assert code == 0
    assert_same_tensors(load(model.parent / "tiny-moe-fused-int8"), fused_int8(model))
    assert not list(model.glob("*fused*"))


def test_a_repo_id_is_converted_into_the_working_directory(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    requested: list[tuple[str, str | None]] = []

    def download(repo: str, revision: str | None, _: object) -> LocalFiles:
        requested.append((repo, revision))
        return LocalFiles(model)

    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setattr(hub, "_download", download)
    assert run_cli(capsys, "convert", "org/name@v1", "--to", "fused-int8", "--cache")[0] == 0
    assert requested == [("org/name", "v1")]
    assert (work / "name-fused-int8" / "config.json").exists()


def test_the_cache_is_refused_for_a_local_model(model: Path, tmp_path: Path, capsys: Capture) -> None:
    words: list[str | Path] = ["convert", model, "--to", "fused-int8", "--out", tmp_path / "out", "--cache"]
    code, _, err = run_cli(capsys, *words)
    assert (code, "--cache has no effect with a local model" in err) == (2, True)
    assert not (tmp_path / "out").exists()
    words[1] = tmp_path / "missing"  # then that is what has to be known
    assert run_cli(capsys, *words)[0] == 3


def test_json_is_one_object(model: Path, tmp_path: Path, capsys: Capture) -> None:
    code, out, err = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", tmp_path / "out", "--json")
    assert (code, err) == (0, "")
    assert out.count("\n") == 1
    value = json.loads(out)
    manifest = json.loads((tmp_path / "out" / "quarkconv.json").read_text())
    assert value["schema"] == "quarkconv.convert/1"
    assert value["dry_run"] is False
    assert value["plan"] == manifest["plan"]
    assert value["output"] == str(tmp_path / "out")
    assert sorted(value["files"]) == sorted(snapshot(tmp_path / "out"))
    assert value["tensors"] == len(load(tmp_path / "out"))


@pytest.mark.parametrize("as_json", [False, True])
def test_dry_run_writes_nothing(model: Path, tmp_path: Path, capsys: Capture, as_json: bool) -> None:
    before = snapshot(tmp_path)
    arguments: list[str | Path] = [
        "convert",
        model,
        "--to",
        "fused-int8",
        "--dry-run",
        *(["--json"] if as_json else []),
    ]
    code, out, err = run_cli(capsys, *arguments)
    assert (code, err) == (0, "")
    assert snapshot(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-moe"]
    if not as_json:
        assert "Nothing was written" in out
        return
    summary = json.loads(out)
    assert summary["dry_run"] is True
    result = quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "out")
    files = snapshot(result.output)
    assert sorted(summary["files"]) == sorted(files)
    generated = ("config.json", "model.safetensors.index.json", "quarkconv.json")
    assert summary["bytes"] == sum((result.output / file).stat().st_size for file in files if file not in generated)


@pytest.mark.parametrize("ranks", [(), ("--tp", "2")])
def test_the_scheme_is_that_of_the_source_unless_it_is_quantized(
    ranks: tuple[str, ...], checkpoints: Checkpoints, capsys: Capture
) -> None:
    int8, floats = checkpoints("qwen3_moe-quark0.13-f2f"), checkpoints("qwen3_moe-bf16")
    words = ("--to", "fused-int8", "--dry-run", *ranks)
    for source, more, shown in (
        (int8, (), "f2f(ptpc_int8)"),
        (floats, ("--quantize", "all"), "bf16,quantizedtoptpc_int8"),
    ):
        code, out, err = run_cli(capsys, "convert", source, *words, *more)
        assert (code, err) == (0, "")
        assert shown in "".join(out.partition("\noutput")[0].split())
        summary = json.loads(run_cli(capsys, "convert", source, *words, *more, "--json")[1])
        assert summary["quantized"] is bool(more)


def test_dry_run_reports_what_is_impossible(checkpoints: Checkpoints, capsys: Capture) -> None:
    assert run_cli(capsys, "convert", checkpoints("qwen3_moe-bf16"), "--to", "fused-int8", "--dry-run")[0] == 4


@pytest.mark.parametrize(("name", "exit_code", "words"), [(name, *refusal) for name, refusal in REFUSED.items()])
def test_refused_exports_write_nothing(
    checkpoints: Checkpoints, tmp_path: Path, capsys: Capture, name: str, exit_code: int, words: str
) -> None:
    code, out, err = run_cli(capsys, "convert", checkpoints(name), "--to", "fused-int8", "--out", tmp_path / "out")
    assert (code, out) == (exit_code, "")
    assert words in err
    assert "hint:" in err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["--to", "fused-int4"],
        ["--to", ""],
        [],
        ["--to", "fused-int8", "--jobs", "0"],
        ["--to", "fused-int8", "--jobs", "many"],
        ["--to", "fused-int8", "--jobs", "65"],
        ["--to", "fused-int8", "--max-shard-size", "0"],
        ["--to", "fused-int8", "--max-shard-size", "big"],
        ["--to", "fused-int8", "--unknown"],
        ["--to", "fused-int8", "--private"],
        ["--to", "fused-int8", "second-model"],
    ],
)
def test_wrong_usage_exits_2(model: Path, tmp_path: Path, capsys: Capture, arguments: list[str]) -> None:
    code, out, err = run_cli(capsys, "convert", model, *arguments)
    assert (code, out) == (2, "")
    assert err.count("error:") == 1
    assert "Traceback" not in err
    assert [path.name for path in tmp_path.iterdir()] == ["tiny-moe"]
    code, out, _ = run_cli(capsys, "convert", model, *arguments, "--json")
    assert code == 2
    assert json.loads(out)["exit_code"] == 2


def test_a_wrong_target_is_reported_before_a_download(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "locate", lambda model, **_: pytest.fail(f"{model} was looked up"))
    code, _, err = run_cli(capsys, "convert", "org/name", "--to", "fused-int4")
    assert code == 2
    assert "fused-int8" in err


def test_no_such_directory_exits_3(tmp_path: Path, capsys: Capture) -> None:
    code, out, err = run_cli(capsys, "convert", tmp_path / "nothing", "--to", "fused-int8", "--json")
    assert code == 3
    assert json.loads(out)["file"] == str(tmp_path / "nothing")
    assert "model directory does not exist" in err
    assert not list(tmp_path.iterdir())


def test_a_damaged_source_exits_3_and_writes_nothing(model: Path, tmp_path: Path, capsys: Capture) -> None:
    file = model / "model-00002-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 10)
    code, _, err = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", tmp_path / "out")
    assert code == 3
    assert "shard-truncated" in err
    assert file.name in err
    assert not (tmp_path / "out").exists()


def test_messages_escape_control_characters(model: Path, tmp_path: Path, capsys: Capture) -> None:
    name = "model.layers.0.\x1b[31mred.weight"  # int8 without a scale
    edit_checkpoint(model, lambda tensors: tensors.update({name: torch.zeros(2, 3, dtype=torch.int8)}))
    code, out, err = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", tmp_path / "\x1b[1mout")
    assert code == 3
    assert "31mred" in err
    assert "\x1b" not in out + err


def test_help_and_version_are_printed(capsys: Capture) -> None:
    code, out, err = run_cli(capsys, "--version")
    assert (code, err) == (0, "")
    assert out == f"quarkconv {quarkconv.__version__}\n"
    code, out, err = run_cli(capsys, "--help")
    assert (code, err) == (0, "")
    for command in ("inspect", "convert", "verify"):
        assert command in out
    code, out, _ = run_cli(capsys, "convert", "--help")
    assert code == 0
    for option in ("--to", "--out", "--max-shard-size", "--jobs", "--dry-run", "--overwrite", "--json", "fused-int8"):
        assert option in out


def test_the_module_and_the_script_are_the_program(model: Path, tmp_path: Path) -> None:
    script = Path(sys.executable).with_name("quarkconv")
    hashes = []
    for number, program in enumerate(([sys.executable, "-m", "quarkconv"], [str(script)])):
        out = tmp_path / f"out-{number}"
        command = [*program, "convert", str(model), "--to", "fused-int8", "--out", str(out), "--json"]
        run = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_TIMEOUT, check=False)
        assert (run.returncode, run.stderr) == (0, "")
        assert json.loads(run.stdout)["output"] == str(out)
        hashes.append(snapshot(out))
    assert hashes[0] == hashes[1]


@pytest.mark.parametrize("verbose", [False, True])
def test_verbose_shows_how_files_are_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, verbose: bool
) -> None:
    model = make_checkpoint(tmp_path / "model", layers=3)
    opened = os.open

    def refuse_direct(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & os.O_DIRECT:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        return opened(path, flags, *args, **kwargs)

    monkeypatch.setattr(os, "open", refuse_direct)
    words: list[str | Path] = [
        "convert",
        model,
        "--to",
        "fused-int8",
        "--max-shard-size",
        "5000",
        *(["-v"] if verbose else []),
    ]
    code, _, err = run_cli(capsys, *words)
    assert code == 0
    assert err.count("writing through the page cache") == verbose
    assert bool(err) == verbose
