"""``convert`` of a repo on the Hub: what a copy on disk gives, byte for byte, without a copy on disk."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants, snapshot_download
from support.checkpoints import edit_checkpoint, make_checkpoint
from support.conversions import execute
from support.exports import Checkpoints
from support.hub_state import Hub
from support.program import run_cli, snapshot
from support.progress import FullDisk

import quarkconv
from quarkconv.errors import HubError, SourceError, UsageError, WriteError
from quarkconv.files import blocks, read_ahead, remote
from quarkconv.hub.locate import locate
from quarkconv.hub.repo import HubRepo
from quarkconv.write import segments

pytestmark = pytest.mark.long(15)

REPO = "org/tiny-moe"
Capture = pytest.CaptureFixture[str]


def convert(model: str | Path, out: Path, **options: Any) -> quarkconv.ConversionResult:
    return quarkconv.convert_checkpoint(model, "fused-int8", out, **{"max_shard_size": 300_000, "jobs": 2, **options})


def downloaded() -> list[Path]:
    return [path for path in Path(constants.HF_HUB_CACHE).rglob("*") if path.is_file()]


def limit_requests(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """Let requests have so many bytes at most, and join what is at most 64 bytes apart."""
    monkeypatch.setattr(blocks.blocks, "__defaults__", (64,))
    for module, name in ((blocks, "BLOCK_BYTES"), (read_ahead, "BLOCK_BYTES"), (read_ahead, "SLOW_BLOCK_BYTES")):
        monkeypatch.setattr(module, name, size)


@pytest.fixture
def small_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many requests even for small models."""
    limit_requests(monkeypatch, 4096)
    monkeypatch.setattr(segments.cut, "__defaults__", (50_000,))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = make_checkpoint(tmp_path / "model", layers=2, experts=4, hidden=128, intermediate=96, zero_points=True)
    (folder / "tokenizer.json").write_text(json.dumps({"vocab": "x" * 30_000}))
    (folder / "empty.txt").write_bytes(b"")
    return folder


@pytest.fixture
def published(hub: Hub, model: Path) -> Hub:
    hub.publish(REPO, model)
    return hub


@pytest.mark.parametrize("name", ["qwen3_moe-quark0.13-f2f", "mixtral-quark0.11-eager", "step3p5-like-3key_fused"])
def test_real_exports_give_what_a_copy_on_disk_gives(
    name: str, hub: Hub, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    hub.publish(REPO, checkpoints(name))
    convert(checkpoints(name), tmp_path / "local")
    result = convert(REPO, tmp_path / "remote")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")
    assert result.source == f"{REPO}@{hub.refs[REPO]['main']}"
    assert downloaded() == []


@pytest.mark.usefixtures("small_requests", "published")
@pytest.mark.parametrize("target", ["bf16", "compressed-tensors", "w8a8-int8"])
def test_other_targets_are_those_of_the_directory(model: Path, tmp_path: Path, target: str) -> None:
    quarkconv.convert_checkpoint(model, target, tmp_path / "local")
    quarkconv.convert_checkpoint(REPO, target, tmp_path / "remote")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")
    assert downloaded() == []


@pytest.mark.usefixtures("small_requests")
@pytest.mark.parametrize("jobs", [1, 3])
def test_many_small_requests_over_several_connections(published: Hub, model: Path, tmp_path: Path, jobs: int) -> None:
    convert(model, tmp_path / "local")
    published.faults.delay = 0.002
    convert(REPO, tmp_path / "remote", jobs=jobs)
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")
    assert published.busiest > 2
    assert len(published.ranges()) > 100


@pytest.mark.usefixtures("small_requests")
def test_it_survives_a_bad_network(published: Hub, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "local")
    faults = published.faults
    faults.too_many, faults.server_errors, faults.expire_after = 1, 1, 20
    faults.break_after, faults.breaks = 1000, 15
    convert(REPO, tmp_path / "remote")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")
    assert faults.breaks == 0


@pytest.mark.usefixtures("small_requests")
def test_a_conversion_that_failed_resumes(published: Hub, model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "local", max_shard_size=40_000)
    out = tmp_path / "remote"
    with pytest.raises(WriteError):
        convert(REPO, out, progress=FullDisk(4), max_shard_size=40_000, jobs=1)
    finished = sum(path.stat().st_size for path in (out / ".quarkconv" / "files").glob("*.safetensors"))
    assert finished
    published.settle()
    published.sent = 0
    convert(REPO, out, max_shard_size=40_000)
    resumed, published.sent = published.sent, 0
    assert snapshot(out) == snapshot(tmp_path / "local")
    convert(REPO, tmp_path / "again", max_shard_size=40_000)
    assert resumed < published.sent - finished * 0.7


@pytest.mark.usefixtures("small_requests")
def test_another_commit_does_not_resume_what_was_begun(published: Hub, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with pytest.raises(WriteError):
        convert(REPO, out, progress=FullDisk(4), max_shard_size=40_000, jobs=1)
    begun = published.refs[REPO]["main"]
    changed = quarkconv.inspect_checkpoint(model).description.checkpoint.refs()["model.embed_tokens.weight"]
    shard = model / changed.file
    raw = bytearray(shard.read_bytes())
    raw[changed.start] ^= 1
    shard.write_bytes(raw)
    published.publish(REPO, model)
    with pytest.raises(UsageError, match="a different unfinished conversion") as caught:
        convert(REPO, out, max_shard_size=40_000)
    assert (caught.value.found or "").startswith(f"source {REPO}@{begun}, now {REPO}@")
    with pytest.raises(SourceError) as unfinished:
        quarkconv.inspect_checkpoint(out)
    assert f"quarkconv convert {REPO}@{begun} --to" in (unfinished.value.hint or "")
    convert(f"{REPO}@{begun}", out, max_shard_size=40_000)
    assert quarkconv.inspect_checkpoint(out).ok


@pytest.mark.usefixtures("small_requests")
@pytest.mark.parametrize("lie", ["shifted", "size", "silent", "ignored"])
def test_wrong_bytes_never_reach_the_output(published: Hub, tmp_path: Path, lie: str) -> None:
    plan = quarkconv.plan_conversion(REPO, "fused-int8")
    assert plan.shards
    source = locate(REPO).files
    published.faults.lie = lie
    assert isinstance(source, HubRepo)
    with pytest.raises(HubError, match="wrong bytes"):
        execute(plan, source, tmp_path / "out", jobs=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("small_requests")
@pytest.mark.parametrize("fault", ["change_etag_after", "etag_of_store"])
def test_a_file_that_changes_underneath(published: Hub, tmp_path: Path, fault: str) -> None:
    files = sum(1 for _ in published.files(REPO))
    setattr(published.faults, fault, files + 1)  # after everything was looked at once
    with pytest.raises(SourceError, match="has changed since it was listed") as caught:
        convert(REPO, tmp_path / "out")
    assert caught.value.code == "source-changed"
    assert not (tmp_path / "out" / "config.json").exists()


@pytest.mark.parametrize("value", [float("nan"), 0.0])
def test_a_scale_with_a_wrong_value_ends_the_conversion(hub: Hub, model: Path, tmp_path: Path, value: float) -> None:
    name = "model.layers.1.mlp.experts.2.up_proj.weight_scale"
    edit_checkpoint(model, lambda tensors: tensors[name][5:6].fill_(value))
    hub.publish(REPO, model)
    with pytest.raises(SourceError) as caught:
        convert(REPO, tmp_path / "out")
    assert (caught.value.code, caught.value.tensor) == ("scale-invalid", name)
    assert not (tmp_path / "out").exists()
    edit_checkpoint(model, lambda tensors: tensors[name].fill_(1.0))
    edit_checkpoint(model, lambda tensors: tensors[name][5:6].fill_(0.0))
    edit_checkpoint(model, lambda tensors: tensors[name.removesuffix("_scale")][5].fill_(0))
    hub.publish(REPO, model)
    convert(REPO, tmp_path / "remote")
    convert(model, tmp_path / "local")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")


def test_a_snapshot_in_the_cache_is_used(published: Hub, model: Path, tmp_path: Path) -> None:
    folder = Path(snapshot_download(REPO))
    published.requests.clear()
    result = convert(REPO, tmp_path / "out")
    assert result.source == folder
    assert not published.ranges()
    convert(model, tmp_path / "local")
    assert snapshot(tmp_path / "out") == snapshot(tmp_path / "local")


def test_part_of_a_snapshot_is_not(published: Hub, tmp_path: Path) -> None:
    snapshot_download(REPO, allow_patterns=["*.json"])
    result = convert(REPO, tmp_path / "out")
    assert isinstance(result.source, str)
    assert published.ranges()


def test_an_older_snapshot_is_not(published: Hub, model: Path, tmp_path: Path) -> None:
    snapshot_download(REPO)
    (model / "notes.md").write_text("new")
    published.publish(REPO, model)
    convert(REPO, tmp_path / "out")
    assert (tmp_path / "out" / "notes.md").read_text() == "new"


@pytest.mark.usefixtures("published")
def test_the_cache_on_request(tmp_path: Path) -> None:
    result = convert(REPO, tmp_path / "out", cache=True)
    assert isinstance(result.source, Path)
    assert downloaded()


@pytest.mark.usefixtures("published")
def test_offline_the_cache_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    snapshot_download(REPO)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    convert(REPO, tmp_path / "out")
    assert quarkconv.inspect_checkpoint(tmp_path / "out").ok


def test_the_command_converts_a_repo(
    published: Hub, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.rmtree(tmp_path / "model")
    code, out, _ = run_cli(capsys, "convert", REPO, "--to", "fused-int8", "--dry-run", "--json")
    assert code == 0
    assert json.loads(out)["source"] == f"{REPO}@{published.refs[REPO]['main']}"
    code, out, _ = run_cli(capsys, "convert", REPO, "--to", "fused-int8", "--json")
    assert code == 0
    assert json.loads(out)["output"] == "tiny-moe-fused-int8"
    code, out, _ = run_cli(capsys, "verify", "tiny-moe-fused-int8", "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)


def test_memory_does_not_hold_the_model(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_checkpoint(tmp_path / "big", layers=1, experts=8, hidden=512, intermediate=512)
    hub.publish(REPO, folder)
    held: list[int] = []
    fetch = HubRepo.fetch
    limit_requests(monkeypatch, 2**16)
    monkeypatch.setattr("quarkconv.files.read_ahead.AHEAD_BYTES", 2**18)

    def counting(self: HubRepo, requested: Any) -> bytes:
        data = fetch(self, requested)
        held.append(len(data))
        return data

    monkeypatch.setattr(HubRepo, "fetch", counting)
    convert(REPO, tmp_path / "out")
    assert max(held) <= 2**17  # the guess at a header, and blocks
    assert os.stat(folder / "model-00001-of-00002.safetensors").st_size > remote.CONNECTIONS * 2**16


@pytest.mark.usefixtures("small_requests")
def test_float_weights_are_quantized_on_their_way_from_the_hub(hub: Hub, model: Path, tmp_path: Path) -> None:
    source = quarkconv.convert_checkpoint(model, "bf16", tmp_path / "bf16").output
    hub.publish(REPO, source)
    convert(REPO, tmp_path / "remote", quantize="all")
    convert(source, tmp_path / "local", quantize="all")
    assert snapshot(tmp_path / "remote") == snapshot(tmp_path / "local")
    assert downloaded() == []
