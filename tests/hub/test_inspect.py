"""``inspect`` of a repo on the Hub: the same answer as of a copy on disk, from a few bytes."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from huggingface_hub import constants
from support.checkpoints import make_checkpoint
from support.exports import Checkpoints
from support.hub_state import Hub
from support.model import Model
from support.program import run_cli

from quarkconv import inspect_checkpoint
from quarkconv.errors import HubError, SourceError
from quarkconv.headers import remote as remote_headers

REPO = "org/tiny-moe"
Capture = pytest.CaptureFixture[str]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe-quark0.13-f2f", "mixtral-quark0.11-eager", "qwen3_moe-0.11-eager-sharded"])
def test_the_answer_is_that_of_a_copy_on_disk(name: str, deep: bool, hub: Hub, checkpoints: Checkpoints) -> None:
    folder = checkpoints(name)
    hub.publish(REPO, folder)
    remote = inspect_checkpoint(REPO, deep=deep).to_json()
    assert remote == {**inspect_checkpoint(folder, deep=deep).to_json(), "model": REPO}


def test_headers_alone_are_read(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "m", layers=2, experts=4, hidden=512, intermediate=256)
    monkeypatch.setattr(remote_headers, "FIRST_GUESS", 1000)
    hub.publish(REPO, folder)
    assert inspect_checkpoint(REPO).ok
    total = sum(path.stat().st_size for path in folder.iterdir())
    assert hub.sent < total / 50
    assert len([item for item in hub.ranges() if not item.startswith("bytes=0-")]) == 2, "the rest of two headers"
    assert list(constants.HF_HUB_CACHE and Path(constants.HF_HUB_CACHE).glob("*")) == []


@pytest.mark.parametrize("guess", [1, 7, 8, 9, 1000, 2**30])
def test_headers_longer_or_shorter_than_the_first_guess_are_read(
    guess: int, hub: Hub, checkpoints: Checkpoints, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_headers, "FIRST_GUESS", guess)
    hub.publish(REPO, checkpoints("qwen3_moe-0.11-f2f"))
    assert inspect_checkpoint(REPO).to_json()["tensors"] > 0


def test_each_revision_is_read(hub: Hub, tmp_path: Path) -> None:
    first = hub.publish(REPO, make_checkpoint(tmp_path / "one", experts=3))
    hub.publish(REPO, make_checkpoint(tmp_path / "two", experts=4), "v2")
    hub.publish(REPO, make_checkpoint(tmp_path / "three", experts=5))
    experts = [inspect_checkpoint(name).to_json()["moe"]["experts"] for name in (REPO, f"{REPO}@v2", f"{REPO}@{first}")]
    assert experts == [5, 4, 3]


def test_a_damaged_repo_is_described(hub: Hub, tmp_path: Path) -> None:
    folder = Model().write(tmp_path / "model")
    shard = folder / "model-00002-of-00002.safetensors"
    (folder / "model-00001-of-00002.safetensors").unlink()
    shard.write_bytes(shard.read_bytes()[:-5])
    hub.publish(REPO, folder)
    codes = {item.code for item in inspect_checkpoint(REPO).findings}
    assert {"shard-missing", "shard-truncated"} <= codes


def test_a_repo_without_weights_is_refused(hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    hub.publish(REPO, tmp_path / "m")
    with pytest.raises(SourceError, match="no safetensors file"):
        inspect_checkpoint(REPO)


@pytest.fixture
def published(hub: Hub, tmp_path: Path) -> Hub:
    hub.publish(REPO, make_checkpoint(tmp_path / "m", hidden=64, intermediate=64))
    hub.requests.clear()
    return hub


def test_private_and_gated_repos_need_a_token(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    published.faults.token = "hf_right"
    with pytest.raises(HubError, match="neither a local directory nor a repo") as caught:
        inspect_checkpoint(REPO)
    assert "HF_TOKEN" in (caught.value.hint or "")
    published.faults.gated = True
    with pytest.raises(HubError, match="gated") as caught:
        inspect_checkpoint(REPO)
    assert f"{published.url}/{REPO}" in (caught.value.hint or "")
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert inspect_checkpoint(REPO).ok  # the store asserts that it never sees the token


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("model", "message"),
    [("org/nothing", "neither a local directory"), (f"{REPO}@nowhere", "no such revision"), ("a--b/c", "neither")],
)
def test_what_the_hub_does_not_have(model: str, message: str, capsys: Capture) -> None:
    code, out, err = run_cli(capsys, "inspect", model, "--json")
    assert code == 3
    assert message in json.loads(out)["error"]
    assert json.loads(out)["code"] == "hub-unavailable"
    assert "Traceback" not in err


def test_rate_limits_and_server_errors_pass(published: Hub) -> None:
    published.faults.too_many = 2
    assert inspect_checkpoint(REPO).ok
    published.faults.server_errors = 2
    assert inspect_checkpoint(REPO).ok


@pytest.mark.parametrize("lie", ["shifted", "size", "ignored", "silent"])
def test_an_answer_with_other_bytes_is_refused(published: Hub, lie: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote_headers, "FIRST_GUESS", 1000)
    published.faults.lie = lie
    with pytest.raises(HubError, match="sent the wrong bytes") as caught:
        inspect_checkpoint(REPO)
    assert caught.value.expected is not None
    assert caught.value.expected.startswith("bytes 0-")


def test_broken_connections_go_on_where_they_broke(published: Hub) -> None:
    expected = inspect_checkpoint(REPO).to_json()
    published.requests.clear()
    published.faults.break_after, published.faults.breaks = 500, 6
    assert inspect_checkpoint(REPO).to_json() == expected
    assert any(item.startswith("bytes=500-") for item in published.ranges())


def test_connections_that_always_break_fail_in_the_end(published: Hub) -> None:
    published.faults.break_after, published.faults.breaks = 500, 10**6
    published.faults.stuck = True
    with pytest.raises(HubError, match="cannot be reached"):
        inspect_checkpoint(REPO)


def test_a_file_that_changed_since_it_was_listed(published: Hub) -> None:
    published.faults.change_etag_after = 1
    with pytest.raises(SourceError, match="has changed since it was listed") as caught:
        inspect_checkpoint(REPO)
    assert caught.value.code == "source-changed"


def test_an_expired_address_is_requested_again(published: Hub) -> None:
    published.faults.expire_after = 1
    assert inspect_checkpoint(REPO, deep=True).ok
    assert published.heads > 2


def test_offline_the_cache_is_required(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match="cache does not hold this model") as caught:
        inspect_checkpoint(REPO)
    assert "HF_HUB_OFFLINE" in (caught.value.hint or "")
    assert published.requests == []


@pytest.mark.usefixtures("hub")
def test_a_server_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(HubError, match="cannot be reached") as caught:
        inspect_checkpoint(REPO)
    assert "127.0.0.1:9" in (caught.value.expected or "")
