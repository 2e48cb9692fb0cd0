"""Models in buckets of the Hub, read from a server that behaves as huggingface_hub's source says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.hub_state import Hub, Stored
from support.program import run_cli, snapshot

import quarkconv
from quarkconv.errors import HubError, SourceError
from quarkconv.hub.buckets import open_hub_bucket

BUCKET = "org/weights"
URL = f"hf://buckets/{BUCKET}/models/tiny-moe"
Capture = pytest.CaptureFixture[str]


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "model", layers=2, experts=4, hidden=128, intermediate=96, zero_points=True)
    (folder / "tokenizer").mkdir()
    (folder / "tokenizer" / "words and more.txt").write_text("a b c")
    return folder


@pytest.fixture
def bucket(hub: Hub, model: Path) -> Hub:
    """A bucket with the model, and neighbours whose paths begin alike."""
    hub.fill_bucket(BUCKET, model, "models/tiny-moe/")
    hub.buckets[BUCKET]["models/tiny-moe-2/config.json"] = Stored(b"{}")
    hub.buckets[BUCKET]["models/tiny-moe.txt"] = Stored(b"other")
    hub.requests.clear()
    return hub


def test_inspect_answers_as_of_the_directory(bucket: Hub, model: Path, capsys: Capture) -> None:
    code, out, err = run_cli(capsys, "inspect", URL, "--json")
    assert (code, err) == (0, "")
    local = json.loads(run_cli(capsys, "inspect", model, "--json")[1])
    assert json.loads(out) == {**local, "model": URL}
    assert bucket.sent < sum(path.stat().st_size for path in model.glob("*.safetensors"))


@pytest.mark.usefixtures("bucket")
def test_the_files_are_those_of_the_folder(model: Path) -> None:
    names = {path.relative_to(model).as_posix() for path in model.rglob("*") if path.is_file()}
    assert open_hub_bucket(URL).entries.keys() == names
    assert len(open_hub_bucket(f"hf://buckets/{BUCKET}").entries) == len(names) + 2


def test_convert_and_verify_give_what_the_directory_gives(bucket: Hub, model: Path, tmp_path: Path) -> None:
    bucket.faults.break_after, bucket.faults.breaks = 5000, 3
    remote = quarkconv.convert_checkpoint(f"{URL}/", "fused-int8", tmp_path / "remote", max_shard_size=40_000)
    assert remote.source == URL
    quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "local", max_shard_size=40_000)
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")
    assert bucket.faults.breaks == 0
    verified = quarkconv.verify_checkpoint(tmp_path / "remote", URL, "cpu", tokens=4)
    assert verified.ok
    assert verified.bytes.against_source


def test_the_token_goes_to_the_hub_alone(bucket: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    bucket.faults.token = "hf_right"
    with pytest.raises(HubError):
        quarkconv.inspect_checkpoint(URL)
    monkeypatch.setenv("HF_TOKEN", "hf_right")
    assert quarkconv.inspect_checkpoint(URL).ok  # the store asserts that it never sees the token


def test_a_file_that_is_replaced_is_noticed(bucket: Hub) -> None:
    files = open_hub_bucket(URL)
    name = next(name for name in files.entries if name.endswith(".safetensors"))
    data = bucket.buckets[BUCKET][f"models/tiny-moe/{name}"].data
    bucket.buckets[BUCKET][f"models/tiny-moe/{name}"] = Stored(data[:-1] + bytes([data[-1] ^ 1]))
    with pytest.raises(SourceError, match="has changed since it was listed") as caught:
        files.check_unchanged([name])
    assert (caught.value.code, caught.value.file) == ("source-changed", f"{URL}/{name}")


def test_a_file_whose_hash_is_not_stated_is_not_read(bucket: Hub) -> None:
    bucket.states_xet_hash = False
    with pytest.raises(HubError, match="lacks the hash"):
        quarkconv.inspect_checkpoint(URL)


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize(
    ("url", "code", "message"),
    [
        ("hf://buckets/org/nothing", 3, "bucket does not exist"),
        (f"hf://buckets/{BUCKET}/other", 3, "URL has no files"),
        ("hf://buckets/org", 2, "Invalid URL of a bucket"),
        (f"hf://buckets/{BUCKET}/../x", 2, "Invalid URL of a bucket"),
        ("hf://org/name", 2, "does not read models from this URL"),
    ],
)
def test_what_is_not_there_is_named(capsys: Capture, url: str, code: int, message: str) -> None:
    found, out, _ = run_cli(capsys, "inspect", url, "--json")
    assert (found, message in json.loads(out)["error"]) == (code, True)


@pytest.mark.usefixtures("bucket")
@pytest.mark.parametrize("options", [["--out", URL], ["--out", "modelscope://org/name"], ["--push", URL], ["--cache"]])
def test_buckets_are_only_read(
    options: list[str], capsys: Capture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, out, _ = run_cli(capsys, "convert", URL, "--to", "fused-int8", *options, "--json")
    assert (code, bool(json.loads(out)["hint"])) == (2, True)
    assert not list(tmp_path.glob("*hf*"))
