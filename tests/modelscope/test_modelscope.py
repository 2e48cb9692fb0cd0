"""Models on ModelScope, read from a server that behaves as the source of its client says."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub.utils import close_session  # type: ignore[attr-defined]
from support.checkpoints import make_checkpoint
from support.modelscope_server import LFS_BYTES, ModelScope, modelscope
from support.program import run_cli, snapshot
from support.progress import AfterAdvances

import quarkconv
from quarkconv.errors import HubError, SourceError
from quarkconv.files import http
from quarkconv.headers import remote as remote_headers
from quarkconv.modelscope import repo as modelscope_repo
from quarkconv.modelscope.repo import open_modelscope

REPO = "org/tiny-moe"
URL = f"modelscope://{REPO}"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModelScope]:
    """An empty service, to which the environment leads; tokens and proxies of this machine are out of reach."""
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("MODELSCOPE_API_TOKEN", raising=False)
    monkeypatch.setenv("HF_TOKEN", "hf_secret")  # it must not reach the service
    monkeypatch.setattr(http, "FIRST_WAIT", 0.01)
    close_session()
    with modelscope() as started:
        monkeypatch.setenv("MODELSCOPE_ENDPOINT", f"{started.url}/")
        yield started
    close_session()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "model", layers=2, experts=4, hidden=128, intermediate=96, zero_points=True)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "words & more.txt").write_text("a b c")
    (folder / "empty.txt").write_bytes(b"")
    return folder


@pytest.fixture
def published(service: ModelScope, model: Path) -> ModelScope:
    service.publish(REPO, model)
    assert {len(data) < LFS_BYTES for data in service.files[REPO]["master"].values()} == {True, False}
    return service


def convert(model: str | Path, out: Path, **options: object) -> quarkconv.ConversionResult:
    return quarkconv.convert_checkpoint(model, "fused-int8", out, max_shard_size=40_000, **options)  # type: ignore[arg-type]


@pytest.mark.parametrize("options", [[], ["--deep"]])
def test_inspect_answers_as_of_the_directory(
    published: ModelScope, model: Path, capsys: Capture, options: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote_headers, "FIRST_GUESS", 4096)
    code, out, err = run_cli(capsys, "inspect", URL, "--json", *options)
    assert (code, err) == (0, "")
    local = json.loads(run_cli(capsys, "inspect", model, "--json", *options)[1])
    assert json.loads(out) == {**local, "model": URL}
    assert options or published.sent < sum(path.stat().st_size for path in model.glob("*.safetensors")) / 3


def test_convert_and_verify_give_what_the_directory_gives(
    published: ModelScope, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    published.busy, published.breaks, published.expire_after = 2, 3, 4
    remote = convert(URL, tmp_path / "remote")
    assert remote.source == URL
    assert (published.busy, published.breaks) == (0, 0)
    convert(model, tmp_path / "local")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")
    assert len(published.signed) > sum(len(data) >= LFS_BYTES for data in published.files[REPO]["master"].values())
    assert all(stated.startswith("bytes=") for stated in published.ranges())
    words: list[str | Path] = [
        "verify",
        tmp_path / "remote",
        "--source",
        URL,
        "--tokens",
        "4",
        "--device",
        "cpu",
        "--json",
    ]
    code, out, _ = run_cli(capsys, *words)
    assert (code, json.loads(out)["bytes"]["against_source"]) == (0, True)


def test_a_checkpoint_there_is_verified_without_a_copy(service: ModelScope, model: Path, tmp_path: Path) -> None:
    service.publish(f"{REPO}-fused", convert(model, tmp_path / "out").output)
    result = quarkconv.verify_checkpoint(f"{URL}-fused", None, "cpu", tokens=4)
    assert result.ok
    assert result.bytes.skipped is None


def test_the_output_has_the_name_of_the_model(
    published: ModelScope, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    published.publish(REPO, model, "v1.0")
    monkeypatch.chdir(tmp_path)
    assert run_cli(capsys, "convert", f"{URL}@v1.0", "--to", "fused-int8")[0] == 0
    assert (tmp_path / "tiny-moe-fused-int8" / "config.json").is_file()


def test_a_private_model_needs_the_token(published: ModelScope, monkeypatch: pytest.MonkeyPatch) -> None:
    published.token = "ms-right"
    with pytest.raises(HubError, match="refuses access") as caught:
        quarkconv.inspect_checkpoint(URL)
    assert "MODELSCOPE_API_TOKEN" in (caught.value.hint or "")
    assert caught.value.found == "403 access denied"
    monkeypatch.setenv("MODELSCOPE_API_TOKEN", "ms-right")
    assert quarkconv.inspect_checkpoint(URL).ok  # the store asserts that it never sees the token


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("modelscope://org/nothing", 3, "no such model, revision or file"),
        (f"{URL}@nowhere", 3, "no such model, revision or file"),
        ("modelscope://org", 2, "Invalid name"),
        ("modelscope://org/../name", 2, "Invalid name"),
    ],
)
def test_what_is_not_there_is_named(capsys: Capture, url: str, code: int, message: str) -> None:
    found, out, _ = run_cli(capsys, "inspect", url, "--json")
    assert (found, message in json.loads(out)["error"]) == (code, True)


def test_a_listing_that_cannot_be_trusted_is_refused(
    published: ModelScope, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    published.code = 10010205001
    assert "a message" in json.loads(run_cli(capsys, "inspect", URL, "--json")[1])["found"]
    published.code, published.lists_hashes = 200, False
    with pytest.raises(HubError, match="list of files is invalid") as caught:
        open_modelscope(URL)
    assert (caught.value.found or "").startswith("no SHA-256")
    published.lists_hashes = True
    published.files[REPO]["master"]["../outside"] = b"x"
    with pytest.raises(HubError, match="list of files is invalid"):
        open_modelscope(URL)
    del published.files[REPO]["master"]["../outside"]
    monkeypatch.setattr(modelscope_repo, "MOST_ENTRIES", 4)
    with pytest.raises(HubError, match="does not list all files"):
        open_modelscope(URL)


def test_a_file_that_is_replaced_is_noticed(published: ModelScope, tmp_path: Path) -> None:
    files = published.files[REPO]["master"]

    def replace() -> None:
        for name in [name for name in files if name.endswith(".safetensors")]:
            files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])

    with pytest.raises(SourceError, match="has changed since it was listed") as caught:
        convert(URL, tmp_path / "out", progress=AfterAdvances(1, replace), jobs=1)
    assert caught.value.code == "source-changed"
    assert not (tmp_path / "out" / "config.json").exists()


def test_bytes_of_another_file_are_refused(published: ModelScope) -> None:
    published.linked_hash = "0" * 64
    with pytest.raises(SourceError, match="has changed since it was listed") as caught:
        quarkconv.inspect_checkpoint(URL)
    assert caught.value.found == f"hash {'0' * 64}"


@pytest.mark.usefixtures("service")
def test_a_service_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MODELSCOPE_ENDPOINT", "127.0.0.1:9")
    with pytest.raises(HubError, match="ModelScope cannot be reached") as caught:
        quarkconv.inspect_checkpoint(URL)
    assert "MODELSCOPE_ENDPOINT" in (caught.value.hint or "")


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("options", [["--out", URL], ["--push", URL], ["--cache"]])
def test_models_there_are_only_read(
    options: list[str], capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli(capsys, "convert", URL, "--to", "fused-int8", *options, "--json")
    assert (code, bool(json.loads(out)["hint"])) == (2, True)
    assert not list(tmp_path.glob("modelscope*"))
