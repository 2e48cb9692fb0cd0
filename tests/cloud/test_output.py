"""Conversions whose output is an object store: the bytes of a directory, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.bucket_outputs import convert, interrupted
from support.checkpoints import edit_checkpoint
from support.faulty_proxy import FaultyProxy
from support.program import run_cli, snapshot
from support.progress import AfterAdvances
from support.s3 import OUT, URL, objects, publish, put

import quarkconv
from quarkconv.cloud.objects import MAX_PART_BYTES, MAX_PARTS, PART_BYTES, Objects, part_size
from quarkconv.cloud.uploads import list_uploads
from quarkconv.errors import SourceError, UsageError

pytestmark = pytest.mark.long(15)

Capture = pytest.CaptureFixture[str]


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("from_bucket", [True, False])
def test_the_objects_have_the_bytes_of_a_directory(model: Path, local: dict[str, str], from_bucket: bool) -> None:
    result = convert(URL if from_bucket else model)
    assert result.location == OUT
    assert objects() == local
    assert list_uploads(OUT) == []
    with pytest.raises(UsageError, match="not a directory"):
        assert result.output


@pytest.mark.usefixtures("proxy", "small_parts")
@pytest.mark.parametrize("options", [{"quantize": "all"}, {"quantize": "all", "exclude": ["*.self_attn.*"]}])
def test_float_weights_are_quantized_from_bucket_to_bucket(
    model: Path, tmp_path: Path, options: dict[str, Any]
) -> None:
    source = quarkconv.convert_checkpoint(model, "bf16", tmp_path / "bf16").output
    publish(source)
    convert(URL, **options)
    convert(source, tmp_path / "local", **options)
    assert objects() == snapshot(tmp_path / "local")


@pytest.mark.usefixtures("small_parts")
def test_shards_of_several_parts_have_the_bytes_of_a_directory(
    published: FaultyProxy, model: Path, local: dict[str, str]
) -> None:
    convert(model)
    assert objects() == local
    assert list_uploads(OUT) == []
    parts = [path for method, path in published.requests if method == "PUT" and "partNumber=" in path]
    assert len(parts) > 2 * sum(name.endswith(".safetensors") for name in local)


@pytest.mark.usefixtures("published")
def test_the_command_and_what_reads_its_output(model: Path, capsys: Capture, local: dict[str, str]) -> None:
    words: list[str | Path] = ["convert", model, "--to", "fused-int8", "--out", f"{OUT}/", "--max-shard-size", "40000"]
    code, out, _ = run_cli(capsys, *words, "--dry-run", "--json")
    assert (code, json.loads(out)["output"], objects()) == (0, OUT, {})
    code, out, _ = run_cli(capsys, *words)
    assert code == 0
    assert f"quarkconv verify {OUT}" in out
    assert objects() == local
    code, out, _ = run_cli(capsys, "inspect", OUT, "--json")
    assert (code, json.loads(out)["moe"]["layout"]) == (0, "fused")


@pytest.mark.usefixtures("published")
def test_a_scale_that_is_nan_leaves_no_model(model: Path) -> None:
    name = "model.layers.0.mlp.experts.2.up_proj.weight_scale"
    edit_checkpoint(model, lambda tensors: tensors[name][5:6].fill_(float("nan")))
    publish(model)
    with pytest.raises(SourceError, match="A scale is NaN or infinite") as caught:
        convert(URL)
    assert caught.value.tensor == name
    assert objects() == {}


@pytest.mark.usefixtures("proxy")
def test_other_objects_are_refused_and_left_alone(model: Path, local: dict[str, str]) -> None:
    put(f"{OUT}/notes.txt", b"mine")
    for overwrite in (False, True):
        with pytest.raises(UsageError, match="other objects") as caught:
            convert(model, overwrite=overwrite)
        assert caught.value.found == "notes.txt"
        assert list(objects()) == ["notes.txt"]
    Objects(OUT).delete(["notes.txt"])
    convert(model)
    with pytest.raises(UsageError, match="other objects") as caught:
        convert(model)
    assert caught.value.hint == "replace the earlier conversion with --overwrite"
    put(f"{OUT}/deep/notes.txt", b"mine")
    with pytest.raises(UsageError, match="other objects"):
        convert(model, overwrite=True)
    assert objects().keys() == {*local, "deep/notes.txt"}


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("finished", [True, False])
def test_overwrite_replaces_an_earlier_conversion(model: Path, local: dict[str, str], finished: bool) -> None:
    if finished:
        convert(model, max_shard_size=20_000)
    else:
        interrupted(model, 3, max_shard_size=20_000)
    put("s3://models/out/tiny-moe-2/notes.txt", b"mine")
    convert(model, overwrite=True)
    assert objects() == local
    assert list(objects("s3://models/out/tiny-moe-2")) == ["notes.txt"]


def test_without_permission_no_byte_of_a_shard_is_sent(published: FaultyProxy, model: Path, capsys: Capture) -> None:
    published.deny = ("PUT", "POST")
    code, out, _ = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", OUT, "--json")
    error = json.loads(out)
    assert (code, error["error"]) == (5, "The object store refuses access")
    assert "AWS_ACCESS_KEY_ID" in error["hint"]
    assert {path for method, path in published.requests if method in ("PUT", "POST") and "out/" in path} == {
        "/models/out/tiny-moe/.quarkconv/plan.json"
    }


def test_a_clock_that_is_wrong_is_named(published: FaultyProxy, model: Path, capsys: Capture) -> None:
    published.deny, published.deny_code = ("PUT", "POST", "GET"), "RequestTimeTooSkewed"
    for words, expected in ((["convert", model, "--to", "fused-int8", "--out", OUT], 5), (["inspect", URL], 3)):
        code, out, _ = run_cli(capsys, *words, "--json")
        error = json.loads(out)
        assert (code, error["hint"].partition(";")[0]) == (expected, "set the clock")
        assert "RequestTimeTooSkewed" in error["found"]


@pytest.mark.usefixtures("published")
def test_a_bucket_that_does_not_exist_is_named(model: Path, capsys: Capture) -> None:
    code, out, _ = run_cli(capsys, "convert", model, "--to", "fused-int8", "--out", "s3://nothing/here", "--json")
    assert (code, json.loads(out)["error"]) == (5, "The bucket does not exist")


@pytest.mark.usefixtures("published")
def test_missing_credentials_are_named_without_waiting(
    model: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "credentials"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    words: list[str | Path] = ["convert", model, "--to", "fused-int8", "--out", OUT]
    code, out, _ = run_cli(capsys, *words, "--json")
    error = json.loads(out)
    assert (code, error["error"]) == (2, "Credentials for the object store are missing")
    assert "AWS_SKIP_SIGNATURE" in error["hint"]
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert "team" in json.loads(run_cli(capsys, *words, "--json")[1])["found"]
    (tmp_path / "credentials").write_text("[team]\naws_access_key_id = key\naws_secret_access_key = secret\n")
    assert run_cli(capsys, *words)[0] == 0


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize(
    ("out", "options"), [("s3://models", {}), (f"{URL}/inside", {}), ("s3://models/org", {}), (OUT, {"tp": 2, "ep": 2})]
)
def test_outputs_that_cannot_be_are_wrong_usage(out: str, options: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        convert(URL, out, **options)


@pytest.mark.usefixtures("published")
def test_a_source_that_is_replaced_leaves_no_model(model: Path) -> None:
    def replace() -> None:
        for path in model.glob("*.safetensors"):
            data = bytearray(path.read_bytes())
            data[-1] ^= 1
            path.write_bytes(data)
        publish(model)

    with pytest.raises(SourceError, match="has changed since it was listed"):
        convert(URL, progress=AfterAdvances(1, replace), jobs=1)
    assert "config.json" not in objects()
    assert list_uploads(OUT) == []


def test_the_size_of_parts_keeps_to_the_limits() -> None:
    assert part_size(0) == part_size(5 * 10**9) == PART_BYTES
    for nbytes in (PART_BYTES * MAX_PARTS, PART_BYTES * MAX_PARTS + 1, 10**12, 5 * 2**40, MAX_PARTS * MAX_PART_BYTES):
        size = part_size(nbytes)
        assert -(-nbytes // size) <= MAX_PARTS
        assert PART_BYTES <= size <= MAX_PART_BYTES
        assert size % 2**20 == 0
    with pytest.raises(UsageError, match="cannot hold a shard"):
        part_size(MAX_PARTS * MAX_PART_BYTES + 1)
