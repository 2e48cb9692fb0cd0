"""Answers that servers between here and the Hub give, and addresses and names that are not the usual ones."""

from __future__ import annotations

import hashlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download
from support.hub_server import HubHandler, start_hub
from support.hub_state import Hub, Stored
from support.program import PROCESS_TIMEOUT, run_cli, snapshot

import quarkconv
from quarkconv.errors import HubError, SourceError
from quarkconv.files import http as http_client
from quarkconv.files.base import Range
from quarkconv.headers import remote as remote_headers
from quarkconv.hub.locate import locate
from quarkconv.hub.repo import HubRepo

REPO = "org/tiny-moe"
SHARD = "model-00001-of-00002.safetensors"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def published(hub: Hub, model: Path, monkeypatch: pytest.MonkeyPatch) -> Hub:
    hub.publish(REPO, model)
    monkeypatch.setattr(remote_headers, "FIRST_GUESS", 1000)
    return hub


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """huggingface_hub's own waits take no time."""
    monkeypatch.setattr("huggingface_hub.utils._http.time", SimpleNamespace(sleep=lambda _: None))


def same_as_on_disk(model: Path, tmp_path: Path, repo: str = REPO) -> None:
    quarkconv.convert_checkpoint(repo, "fused-int8", tmp_path / "remote")
    quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "local")
    remote, local = snapshot(tmp_path / "remote"), snapshot(tmp_path / "local")
    assert remote == local


@pytest.mark.parametrize("lie", ["gzip", "416"])
def test_answers_that_are_not_the_range(published: Hub, lie: str) -> None:
    published.faults.lie = lie
    with pytest.raises(HubError, match="wrong bytes") as caught:
        quarkconv.inspect_checkpoint(REPO)
    assert lie in (caught.value.found or "")


def test_empty_responses_are_retried_a_few_times_only(published: Hub) -> None:
    published.faults.lie = "empty"
    with pytest.raises(HubError, match="end before the requested range"):
        quarkconv.inspect_checkpoint(REPO)
    assert len(published.ranges()) < 50


def test_an_answer_that_never_ends_is_left(published: Hub, model: Path) -> None:
    source = locate(REPO).files
    assert isinstance(source, HubRepo)
    published.faults.lie = "endless"
    expected = (model / SHARD).read_bytes()
    assert source.fetch(Range(SHARD, 10, 2510)) == expected[10:2510]
    assert source.fetch(Range(SHARD, 0, len(expected))) == expected


@pytest.mark.parametrize("breaks", [0, 5])
def test_responses_without_a_length_are_read_again_from_where_they_break(
    published: Hub, model: Path, tmp_path: Path, breaks: int
) -> None:
    faults = published.faults
    faults.chunked, faults.breaks, faults.break_after = True, breaks, 500
    same_as_on_disk(model, tmp_path)
    assert faults.breaks == 0


@pytest.mark.parametrize("part", ["Hub", "store"])
def test_addresses_that_lead_in_a_circle(published: Hub, capsys: Capture, part: str) -> None:
    if part == "Hub":
        published.faults.circle = True
    else:
        published.faults.lie = "circle"
    started = time.monotonic()
    code, out, _ = run_cli(capsys, "inspect", REPO, "--json")
    assert code == 3
    assert json.loads(out)["error"] == "The Hub redirects in a loop"
    assert time.monotonic() - started < 5


def test_a_single_refusal_of_the_store_is_retried(published: Hub, model: Path, tmp_path: Path) -> None:
    published.faults.refusals = 3
    same_as_on_disk(model, tmp_path)


def test_a_store_that_always_refuses_is_reported(published: Hub, capsys: Capture) -> None:
    published.faults.refusals = 10**6
    code, out, err = run_cli(capsys, "inspect", REPO, "--json")
    response = json.loads(out)
    assert code == 3
    assert response["error"] == "The Hub's store refused a request"
    assert published.store_url.removeprefix("http://") in response["expected"]
    assert "Signature" not in out + err, "a signed address is as good as a password"


@pytest.mark.usefixtures("no_waits")
def test_signatures_are_not_shown(published: Hub, capsys: Capture) -> None:
    published.faults.server_errors = 10**6
    code, out, _ = run_cli(capsys, "inspect", REPO, "--json")
    assert code == 3
    assert "503" in json.loads(out)["found"]
    assert "Signature" not in out


def test_signatures_are_not_shown_in_the_log_either(published: Hub, tmp_path: Path) -> None:
    published.faults.server_errors = 1
    command = [sys.executable, "-m", "quarkconv", "inspect", REPO, "-v"]
    environment = os.environ | {"HF_ENDPOINT": published.url, "HF_HOME": str(tmp_path)}
    run = subprocess.run(command, capture_output=True, text=True, timeout=PROCESS_TIMEOUT, check=True, env=environment)
    assert published.faults.server_errors <= 0
    assert "requests" in run.stderr
    assert "Signature" not in run.stdout + run.stderr


def test_stores_have_etags_of_their_own(published: Hub, model: Path, tmp_path: Path) -> None:
    """The Hub may send to another content delivery network when it signs an address again."""
    published.faults.expire_after = 2
    published.other_store_url = published.store_url.replace("localhost", "127.0.0.1")
    same_as_on_disk(model, tmp_path)
    assert published.signatures > 4


@pytest.mark.usefixtures("published")
def test_a_file_of_another_commit_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    send = HubHandler.send_header
    other = "0" * 40
    monkeypatch.setattr(
        HubHandler, "send_header", lambda self, key, value: send(self, key, other if key == "X-Repo-Commit" else value)
    )
    with pytest.raises(SourceError, match="has changed since it was listed") as caught:
        quarkconv.inspect_checkpoint(REPO)
    assert other in (caught.value.found or "")


def test_the_listing_waits_as_long_as_the_hub_requests(published: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    monkeypatch.setattr("quarkconv.files.http.time", SimpleNamespace(sleep=waits.append))
    published.faults.too_many, published.faults.retry_after = 2, "7"
    assert locate(REPO).repo == REPO
    assert waits == [7, 7]
    published.faults.too_many, published.faults.retry_after = 1, str(http_client.LONGEST_REQUESTED + 1)[:-2]
    with pytest.raises(HubError, match="refused a request"):
        locate(REPO)


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [
        ({"RateLimit": '"api";r=0;t=55'}, 55), ({"RateLimit": '"api";r=3;t=55'}, None), ({"Retry-After": "12"}, 12),
        ({"RateLimit": '"api";r=0;t=55', "Retry-After": "1"}, 55), ({"Retry-After": "Wed, 21 Oct 2026 07:28:00"}, None),
        ({}, None), ({"Retry-After": "-1"}, None),
    ],
)  # fmt: skip
def test_the_requested_pause_of_a_response_is_read(headers: dict[str, str], seconds: float | None) -> None:
    assert http_client.requested_pause(headers) == seconds


def test_a_broken_listing_is_requested_again(published: Hub) -> None:
    published.faults.hang_up = 3
    assert isinstance(locate(REPO).files, HubRepo)


@pytest.mark.parametrize("answer", [b"<html>Welcome</html>", b"[]", b"", b'{"siblings": 3}', b'{"id": "a/b"}'])
def test_a_listing_of_the_wrong_type_is_refused(published: Hub, capsys: Capture, answer: bytes) -> None:
    published.faults.answer = answer
    code, out, _ = run_cli(capsys, "inspect", REPO, "--json")
    response = json.loads(out)
    assert (code, response["code"]) == (3, "hub-unavailable")
    assert "HF_ENDPOINT" in response["hint"]


@pytest.mark.parametrize("name", ["../evil.txt", "/ABSOLUTE", "a/../../evil", "a\\..\\evil", "", "a//b", "x\0y", "."])
def test_names_that_lead_out_of_the_repo(hub: Hub, model: Path, tmp_path: Path, name: str) -> None:
    files = {path.name: Stored(path.read_bytes()) for path in model.iterdir()}
    hub.commit(REPO, {**files, name.replace("/ABSOLUTE", str(tmp_path / "evil")): Stored(b"evil")})
    before = snapshot(tmp_path)
    with pytest.raises(HubError, match="list of files is invalid"):
        quarkconv.convert_checkpoint(REPO, "fused-int8", tmp_path / "deep" / "out")
    assert snapshot(tmp_path) == before


@pytest.mark.usefixtures("published")
def test_a_list_without_sizes_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Stored, "etag", property(lambda self: None if not self.lfs else hashlib.sha256().hexdigest()))
    with pytest.raises(HubError, match="list of files is invalid") as caught:
        quarkconv.inspect_checkpoint(REPO)
    assert "size and hash" in (caught.value.expected or "")


def test_revisions_with_slashes_and_names_with_dots(hub: Hub, model: Path, tmp_path: Path, capsys: Capture) -> None:
    repo = "org-1.x/Model.v1.5_int8-W8A8"
    commit = hub.publish(repo, model, "refs/pr/1")
    code, out, _ = run_cli(capsys, "convert", f"{repo}@refs/pr/1", "--to", "fused-int8", "--out", tmp_path / "out",
                           "--json")  # fmt: skip
    assert code == 0, out
    assert json.loads(out)["source"] == f"{repo}@{commit}"
    code, out, _ = run_cli(capsys, "inspect", f"{repo}@refs/pr/2", "--json")
    assert (code, json.loads(out)["error"]) == (3, "The repo has no such revision")
    code, out, _ = run_cli(capsys, "verify", f"{repo}@refs/pr/1", "--tokens", "2", "--device", "cpu", "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)


def test_small_files_are_read_at_another_address_of_the_hub(
    published: Hub, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.resolve_cache, published.faults.token = True, "hf_right"
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    same_as_on_disk(model, tmp_path)
    assert any(
        "resolve-cache" in path for method, path, requested in published.requests if method == "GET" and requested
    )


@pytest.mark.usefixtures("no_waits")
def test_a_hub_that_only_refuses_leaves_the_cache(published: Hub, tmp_path: Path, capsys: Capture) -> None:
    snapshot_download(REPO)
    published.faults.too_many = 10**6
    code, out, _ = run_cli(capsys, "convert", REPO, "--to", "bf16", "--out", tmp_path / "out", "--cache", "--json")
    assert code == 0, out
    assert run_cli(capsys, "inspect", REPO)[0] == 3


def test_a_cache_that_cannot_be_written_to(
    published: Hub, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "file" / "hub"))
    code, out, _ = run_cli(capsys, "convert", REPO, "--to", "bf16", "--out", tmp_path / "out", "--cache", "--json")
    response = json.loads(out)
    assert (code, response["file"]) == (5, str(tmp_path / "file" / "hub"))
    assert "HF_HUB_CACHE" in response["hint"]
    assert published.ranges() == []


def test_an_endpoint_may_have_a_path(hub: Hub, model: Path, tmp_path: Path, point_at: Callable[[str], None]) -> None:
    hub.publish(REPO, model)
    hub.prefix = "/artifacts/api/models-of-others"
    point_at(hub.url + hub.prefix)
    same_as_on_disk(model, tmp_path)


def test_an_endpoint_that_is_an_ipv6_address(model: Path, tmp_path: Path, point_at: Callable[[str], None]) -> None:
    try:
        with socket.create_server(("::1", 0), family=socket.AF_INET6):
            pass
    except OSError as error:
        pytest.skip(f"no IPv6 on loopback: {error.strerror}")
    hub, servers = start_hub("::1")
    point_at(hub.url)
    hub.publish(REPO, model)
    assert "[::1]" in hub.url
    same_as_on_disk(model, tmp_path)
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("part", ["variable", "file"])
def test_a_token_with_a_line_end(published: Hub, monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    published.faults.token = "hf_right"
    if part == "variable":
        monkeypatch.setenv("HF_TOKEN", " hf_right\r\n")
    else:
        Path(constants.HF_TOKEN_PATH).parent.mkdir(parents=True)
        Path(constants.HF_TOKEN_PATH).write_text("hf_right\n")
    assert quarkconv.inspect_checkpoint(REPO).ok


@pytest.mark.usefixtures("published")
def test_a_token_that_no_header_can_hold(capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", os.fsdecode("hf_sécrét".encode()))  # in any locale
    code, out, err = run_cli(capsys, "inspect", REPO, "--json")
    response: dict[str, Any] = json.loads(out)
    assert code == 3
    assert "HF_TOKEN" in response["hint"]
    assert "crét" not in out + err
