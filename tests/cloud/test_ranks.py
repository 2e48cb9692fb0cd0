"""Conversions by rank into an object store: the bytes of directories, and what is deleted or resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.faulty_proxy import FaultyProxy
from support.program import run_cli, snapshot
from support.progress import WhileWriting
from support.s3 import OUT, URL, objects, put

import quarkconv
from quarkconv.cloud.objects import Objects
from quarkconv.cloud.uploads import list_uploads
from quarkconv.errors import SourceError, UsageError

Capture = pytest.CaptureFixture[str]
OPTIONS: dict[str, Any] = {"max_shard_size": 20_000, "jobs": 2}


def convert(model: str | Path, out: str | Path = OUT, **options: Any) -> quarkconv.ConversionResult:
    return quarkconv.convert_checkpoint(model, "fused-int8", out, **{**OPTIONS, **options})


@pytest.fixture(autouse=True)
def bucket(published: FaultyProxy) -> FaultyProxy:
    """A bucket with the model."""
    return published


@pytest.mark.parametrize("options", [{"tp": 2}, {"ep": 3}])
def test_the_objects_have_the_bytes_of_directories(model: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    result = convert(URL, **options)
    convert(model, tmp_path / "out", **options)
    assert objects() == snapshot(tmp_path / "out")
    assert list_uploads(OUT) == []
    (first, *_) = result.outputs
    assert first.location == f"{OUT}/rank-00-of-0{len(result.outputs)}"
    assert quarkconv.verify_checkpoint(str(first.location), URL, "cpu", tokens=4).ok


def test_float_weights_are_quantized_for_each_rank(model: Path, tmp_path: Path) -> None:
    source = quarkconv.convert_checkpoint(model, "bf16", tmp_path / "bf16").output
    convert(source, tp=2, quantize="all")
    convert(source, tmp_path / "out", tp=2, quantize="all")
    assert objects() == snapshot(tmp_path / "out")


def test_a_conversion_that_failed_resumes_and_says_how(
    bucket: FaultyProxy, model: Path, tmp_path: Path, capsys: Capture
) -> None:
    convert(model, tmp_path / "out", tp=2)
    whole = snapshot(tmp_path / "out")

    def stop(_: int) -> None:
        if any(name.startswith("rank-01") and name.endswith(".safetensors") for name in objects()):
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        convert(URL, tp=2, progress=WhileWriting(stop), jobs=1)
    left = objects()
    assert "rank-00-of-02/config.json" in left
    assert not {"rank-01-of-02/config.json", "ranks.json"} & left.keys()
    with pytest.raises(SourceError, match="unfinished conversion") as caught:
        quarkconv.inspect_checkpoint(f"{OUT}/rank-01-of-02")
    assert f"--out {OUT} --tp 2" in (caught.value.hint or "")
    bucket.requests.clear()
    words = ["--to", "fused-int8", "--tp", "2", "--out", OUT, "--max-shard-size", "20000"]
    assert run_cli(capsys, "convert", URL, *words)[0] == 0
    assert objects() == whole
    written = {path for method, path in bucket.requests if method in ("PUT", "POST")}
    assert not any("rank-00-of-02/model" in path for path in written)


def test_the_index_names_the_ranks_and_one_of_them_must_be_chosen(model: Path) -> None:
    convert(model, tp=2)
    found = Objects(OUT).get("ranks.json")
    assert found is not None
    assert [rank["folder"] for rank in json.loads(found[0])["ranks"]] == ["rank-00-of-02", "rank-01-of-02"]
    with pytest.raises(SourceError, match="several ranks") as caught:
        quarkconv.inspect_checkpoint(OUT)
    assert caught.value.hint == f"give one of them: {OUT}/rank-00-of-02"


def test_overwrite_deletes_the_earlier_ranks_and_nothing_else(model: Path, tmp_path: Path) -> None:
    convert(model, tp=2)
    before = objects()
    other: list[dict[str, Any]] = [{"tp": 2}, {"ep": 3}]
    for options in other:
        with pytest.raises(UsageError, match="has other files"):
            convert(model, **options)
    put(f"{OUT}/rank-01-of-02/notes.txt", b"mine")
    with pytest.raises(UsageError, match="other objects") as caught:
        convert(model, ep=3, overwrite=True)
    assert caught.value.found == "notes.txt"
    assert objects().keys() == {*before, "rank-01-of-02/notes.txt"}
    Objects(OUT).delete(["rank-01-of-02/notes.txt"])
    convert(model, ep=3, overwrite=True)
    convert(model, tmp_path / "out", ep=3)
    assert objects() == snapshot(tmp_path / "out")
    put(f"{OUT}/notes.txt", b"mine")
    with pytest.raises(UsageError, match="has other files"):
        convert(model, ep=3, overwrite=True)
    assert "ranks.json" in objects()


@pytest.mark.parametrize("options", [["--part", "1/2"], ["--join"], ["--finish"]])
def test_ranks_are_not_divided_into_parts(capsys: Capture, options: list[str]) -> None:
    words = ["convert", URL, "--to", "fused-int8", "--out", OUT, "--tp", "2", *options, "--json"]
    code, out, _ = run_cli(capsys, *words)
    assert (code, json.loads(out)["error"]) == (2, "Conversions by rank are not divided into parts")
    assert objects() == {}


def test_what_is_pushed_must_be_in_a_directory(capsys: Capture) -> None:
    words = ["convert", URL, "--to", "fused-int8", "--out", OUT, "--push", "org/name", "--json"]
    code, out, _ = run_cli(capsys, *words)
    assert (code, json.loads(out)["expected"]) == (2, "--out DIR")
    assert objects() == {}
