"""``convert --push``: what is uploaded is what was converted."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.hub_state import Hub
from support.program import run_cli, snapshot

import quarkconv

NEW = "user/tiny-moe-fused"
Capture = pytest.CaptureFixture[str]


# huggingface_hub 2.4 hands bytes to its HTTP client in a way that this one will drop
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")


@pytest.fixture(autouse=True)
def _token(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults.token = "hf_right"
    monkeypatch.setenv("HF_TOKEN", hub.faults.token)


def push(capsys: Capture, model: Path, out: Path, repo: str = NEW) -> tuple[int, dict[str, str], str]:
    code, output, err = run_cli(
        capsys, "convert", model, "--to", "fused-int8", "--out", out, "--push", repo, "--max-shard-size", "40000",
        "--json",
    )  # fmt: skip
    return code, json.loads(output), err


def test_every_file_arrives(hub: Hub, model: Path, tmp_path: Path, capsys: Capture) -> None:
    code, output, _ = push(capsys, model, tmp_path / "out")
    assert code == 0, str(output)
    assert output["pushed"] == f"{constants.ENDPOINT}/{NEW}"
    written = {path.relative_to(tmp_path / "out").as_posix(): path for path in (tmp_path / "out").rglob("*")}
    arrived = hub.files(NEW)
    assert {name for name in written if not name.startswith(".")} == set(arrived)
    assert all(arrived[name].data == written[name].read_bytes() for name in arrived)


def test_what_was_quantized_is_uploaded(hub: Hub, model: Path, tmp_path: Path, capsys: Capture) -> None:
    source = quarkconv.convert_checkpoint(model, "bf16", tmp_path / "bf16").output
    words = ("convert", source, "--to", "fused-int8", "--quantize", "all", "--out", tmp_path / "out", "--push", NEW)
    code, _, err = run_cli(capsys, *words)
    assert code == 0, err
    arrived, expected = hub.files(NEW), snapshot(tmp_path / "out")
    assert "model-00001-of-00001.safetensors" in arrived
    assert {name: hashlib.sha256(file.data).hexdigest() for name, file in arrived.items()} == expected


def test_a_failed_upload_resumes_without_converting_again(
    hub: Hub, model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.HfApi.upload_folder", fail)
        code, output, _ = push(capsys, model, tmp_path / "out")
    assert code == 5
    assert output["error"] == "The upload to the Hub failed; the converted files are kept"
    assert output["found"] == "connection lost"
    before = (tmp_path / "out" / "config.json").stat().st_mtime_ns
    code, output, _ = push(capsys, model, tmp_path / "out")
    assert code == 0, str(output)
    assert (tmp_path / "out" / "config.json").stat().st_mtime_ns == before
    assert "config.json" in hub.files(NEW)


def test_the_notes_of_older_clients_are_removed_after_the_upload(
    model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"

    def upload(*_: object, folder_path: Path, **__: object) -> None:  # as huggingface_hub before 2.0
        (folder_path / ".cache" / "huggingface" / "upload").mkdir(parents=True)
        (folder_path / ".cache" / "huggingface" / "upload" / "config.json.metadata").write_text("")

    monkeypatch.setattr("huggingface_hub.HfApi.upload_large_folder", upload, raising=False)
    code, output, _ = push(capsys, model, out)
    assert code == 0, str(output)
    assert not (out / ".cache").exists()
    code, _, err = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", out, "--overwrite")
    assert code == 0, err


def test_a_wrong_name_or_token_is_reported_first(hub: Hub, model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert push(capsys, model, tmp_path / "out", "no-slash")[0] == 2
    hub.faults.token = "hf_other"
    code, output, _ = push(capsys, model, tmp_path / "out")
    assert code == 5
    assert output["error"] == "The repo for --push cannot be created"  # nothing was converted that could be kept
    assert "hf auth login" in output["hint"]
    assert not (tmp_path / "out").exists()


def test_nothing_is_uploaded_unasked(hub: Hub, model: Path, tmp_path: Path, capsys: Capture) -> None:
    assert run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", tmp_path / "out")[0] == 0
    assert hub.requests == []
