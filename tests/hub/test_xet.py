"""Repos in Xet storage: the redirect is followed and ranges are read; hf_xet is for downloads to the cache alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import get_session  # type: ignore[attr-defined]
from huggingface_hub.utils._xet import abort_xet_session
from support.conversions import assert_converts_alike
from support.hub_state import Hub
from support.program import run_cli, snapshot

import quarkconv
from quarkconv.errors import SourceError

REPO = "org/tiny-moe"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def xet(hub: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    """A repo in Xet storage, and huggingface_hub with hf_xet."""
    pytest.importorskip("hf_xet")
    hub.xet = True
    hub.publish(REPO, model)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    monkeypatch.setenv("HF_XET_CACHE", str(tmp_path / "xet"))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    return hub


def paths(hub: Hub, part: str) -> list[str]:
    return [path for _, path, _ in hub.requests if part in path]


def test_the_store_on_loopback_answers_as_xet_storage_does(xet: Hub) -> None:
    """The ETag and size that count are those of the redirect; the store has another ETag, the name in Xet storage."""
    name = "model-00001-of-00002.safetensors"
    file = xet.files(REPO)[name]
    answer = get_session().get(f"{xet.url}/{REPO}/resolve/main/{name}", headers={"Range": "bytes=0-7"})
    (redirect,) = answer.history
    assert redirect.headers["X-Linked-ETag"] == f'"{file.sha256}"'
    assert redirect.headers["X-Linked-Size"] == str(len(file.data))
    assert redirect.headers["X-Xet-Hash"] == file.xet_hash != file.sha256
    assert redirect.links["xet-auth"]["url"] == redirect.headers["X-Xet-Refresh-Route"]
    assert (answer.status_code, answer.content) == (206, file.data[:8])
    assert answer.headers["ETag"] == f'"{file.xet_hash}"'
    assert "X-Linked-ETag" not in answer.headers


def test_inspect_and_convert_read_plain_ranges(xet: Hub, model: Path, tmp_path: Path) -> None:
    remote = quarkconv.inspect_checkpoint(REPO, deep=True).to_json()
    assert remote == {**quarkconv.inspect_checkpoint(model, deep=True).to_json(), "model": REPO}
    assert_converts_alike(REPO, model, tmp_path)
    assert len(paths(xet, "/xet-bridge-us/")) > 5
    assert paths(xet, "xet-read-token") == []
    assert paths(xet, "/v1/") == []


def test_a_signature_that_expires_is_renewed(xet: Hub, model: Path, tmp_path: Path) -> None:
    xet.faults.expire_after = 1
    quarkconv.inspect_checkpoint(REPO, deep=True)
    assert_converts_alike(REPO, model, tmp_path)
    assert xet.signatures > 4


@pytest.mark.parametrize("fault", ["change_etag_after", "etag_of_store"])
def test_a_file_that_changes_underneath(xet: Hub, tmp_path: Path, fault: str) -> None:
    setattr(xet.faults, fault, len(xet.files(REPO)) + 1)
    with pytest.raises(SourceError, match="has changed since it was listed") as caught:
        quarkconv.convert_checkpoint(REPO, "fused-int8", tmp_path / "out")
    assert caught.value.code == "source-changed"
    assert not (tmp_path / "out" / "config.json").exists()


def test_a_download_to_the_cache_is_that_of_hf_xet(xet: Hub, model: Path, tmp_path: Path) -> None:
    quarkconv.convert_checkpoint(REPO, "fused-int8", tmp_path / "remote", cache=True)
    quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "local")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")
    assert len(paths(xet, "xet-read-token")) == 1
    assert len(paths(xet, "/v1/reconstructions/")) == 2, "one for each shard"
    assert paths(xet, "/xet-bridge-us/") == []


def test_a_download_may_go_without_xet(xet: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    quarkconv.convert_checkpoint(REPO, "fused-int8", tmp_path / "out", cache=True)
    assert paths(xet, "xet-read-token") == []
    assert len(paths(xet, "/xet-bridge-us/")) == 2


def test_verify_of_a_repo_that_hf_xet_downloads(xet: Hub, tmp_path: Path, capsys: Capture) -> None:
    converted = quarkconv.convert_checkpoint(REPO, "fused-int8", tmp_path / "out").output
    xet.publish("org/converted", converted)
    code, out, _ = run_cli(
        capsys, "verify", "org/converted", "--source", REPO, "--tokens", "2", "--device", "cpu", "--json"
    )
    assert (code, json.loads(out)["ok"]) == (0, True)
    assert len(paths(xet, "/v1/reconstructions/")) == 3


def test_xet_storage_that_cannot_be_reached(
    xet: Hub, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a proxy lets the Hub through and not the servers of Xet storage."""
    monkeypatch.setenv("HF_XET_CLIENT_RETRY_MAX_ATTEMPTS", "1")
    xet.xet_url = "http://127.0.0.1:9"
    abort_xet_session()  # the next one reads the environment again
    code, out, _ = run_cli(capsys, "convert", REPO, "--to", "bf16", "--out", tmp_path / "out", "--cache", "--json")
    abort_xet_session()
    error = json.loads(out)
    assert (code, error["code"]) == (3, "hub-unavailable")
    assert "Xet" in error["error"]
    assert "HF_HUB_DISABLE_XET=1" in error["hint"]
    assert quarkconv.inspect_checkpoint(REPO).ok, "ranges are read anyway"
