"""``quarkconv tune``: what it refuses without a GPU, and tables that it writes on one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.program import run_cli

from quarkconv.cli.tune import parse_tokens
from quarkconv.errors import UsageError
from quarkconv.tune import kernels, tables
from quarkconv.tune.tables import MEASURED, parse_table

QWEN = "qwen3_moe-quark0.13-f2f"


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_a_machine_without_a_gpu_is_refused_in_one_line(
    capsys: pytest.CaptureFixture[str], checkpoints: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernels, "require_engine", lambda _: None)
    for arguments in ([], ["--for", "vllm"], ["--for", "sglang", "--model", checkpoints(QWEN), "--tp", "2"]):
        assert run_cli(capsys, "tune", *arguments) == (
            4,
            "",
            "error: tune needs a GPU, but torch finds none\n"
            "  hint:     run this on the machine that serves, with a torch built for its GPU\n",
        )  # fmt: skip


@pytest.mark.parametrize(("engine", "name"), [("vllm", "vLLM"), ("sglang", "SGLang")])
def test_an_engine_that_is_not_installed_is_named_in_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, engine: str, name: str
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    code, out, err = run_cli(capsys, "tune", "--for", engine)
    assert (code, out) == (4, "")
    hint = "run this in the environment that serves the model"
    assert err == f"error: {name} is not installed in this environment\n  hint:     {hint}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--for", "llama.cpp"], "Unknown engine"),
        (["--shape", "8,2,64"], "E,K,H,I with K at most E, or MiniMax-M2"),
        (["--shape", "8,2,64,64", "--model", "."], "Give either a model or shapes"),
        (["--tp", "2"], "--tp and --ep divide the experts of a model"),
        (["--tokens", "1,0"], "Invalid --tokens"),
    ],
    ids=str,
)
def test_wrong_usage_exits_2(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _, err = run_cli(capsys, "tune", *arguments)
    assert code == 2
    assert message in err


def test_sizes_are_checked_before_the_engine_is_looked_for(
    capsys: pytest.CaptureFixture[str], checkpoints: Any
) -> None:
    code, _, err = run_cli(capsys, "tune", "--for", "vllm", "--model", checkpoints(QWEN), "--tp", "5")
    assert code == 4
    assert "cannot be divided among 5 ranks" in err


def test_numbers_of_tokens_are_parsed() -> None:
    assert parse_tokens("64,1,64") == (1, 64)
    for text in ("", "1,", "-1", "x", "²", "1" * 30):
        with pytest.raises(UsageError):
            parse_tokens(text)


def test_the_folder_of_shipped_tables_is_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "vllm").mkdir()
    monkeypatch.setattr(tables, "SHIPPED", tmp_path)
    assert run_cli(capsys, "tune", "--for", "vllm", "--print-folder") == (0, f"{tmp_path / 'vllm'}\n", "")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: torch.cuda.is_available() is false")
@pytest.mark.parametrize("engine", ["vllm", "sglang"])
def test_tables_are_written_where_the_engine_looks(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, engine: str
) -> None:
    pytest.importorskip(engine)
    arguments = ["--shape", "8,2,128,64", "--tokens", "1,64", "--jobs", "1", "--out", str(tmp_path), "--json"]
    code, out, _ = run_cli(capsys, "tune", "--for", engine, *arguments)
    assert code == 0
    [table] = json.loads(out)["tables"]
    assert list(parse_table(Path(table["path"]).read_text())) == [1, 64]
    assert Path(table["path"]).name.startswith("E=8,N=64,device_name=")
    assert all(0 < row["tuned_us"] <= row["default_us"] for row in table["tokens"].values())
    assert (tmp_path / MEASURED).is_file()
