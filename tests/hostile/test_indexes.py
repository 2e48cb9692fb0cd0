"""Indexes that lie."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.hostile import corrupted, judge
from support.model import FIRST, SECOND
from support.moe_model import INDEX

from quarkconv import inspect_checkpoint


def index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], object]:
    """Changes the index of a checkpoint."""

    def corrupt(folder: Path) -> None:
        value = json.loads((folder / INDEX).read_text())
        change(value)
        (folder / INDEX).write_text(json.dumps(value))

    return corrupt


def names(file: object) -> Callable[[Path], object]:
    """An index that says that a tensor lies in ``file``."""
    return index(lambda value: value["weight_map"].update({"lm_head.weight": file}))


def text(content: str | bytes) -> Callable[[Path], object]:
    data = content if isinstance(content, bytes) else content.encode()
    return lambda folder: (folder / INDEX).write_bytes(data)


INVALID = {
    "an absolute path": names("/etc/passwd"),
    "an absolute path of a shard": names("/tmp/model.safetensors"),
    "a path that leads out": names("../other/model.safetensors"),
    "a path that leads out and back": names("../model/" + FIRST),
    "a path of Windows": names("..\\model.safetensors"),
    "a file of another kind": names("config.json"),
    "weights of another kind": names("pytorch_model.bin"),
    "a number": names(1),
    "a list nested 90 deep": names(json.loads("[" * 90 + "]" * 90)),
    "a weight_map that is a list": index(lambda value: value.update(weight_map=[])),
    "no weight_map": index(lambda value: value.pop("weight_map")),
    "a list": text("[]"),
    "not JSON": text('{"weight_map":'),
    "not UTF-8": text(b'{"weight_map":{"\xff":"a.safetensors"}}'),
    "nested 100,000 deep": text("[" * 100_000),
    "nested 200 deep": text('{"metadata":' + "[" * 200 + "]" * 200 + ',"weight_map":{}}'),
    "100,000 shards": text(json.dumps({"weight_map": {f"t{i}": f"{i}.safetensors" for i in range(100_000)}})),
    "200 MB": lambda folder: os.truncate(folder / INDEX, 200_000_000),
    "a directory": lambda folder: ((folder / INDEX).unlink(), (folder / INDEX).mkdir()),
}


@pytest.mark.parametrize("name", INVALID)
def test_an_invalid_index_is_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    verdict = judge(corrupted(tmp_path / "model", INVALID[name]), capsys)
    assert (verdict.inspect, verdict.codes) == (1, ["index-invalid"])
    assert (verdict.convert, verdict.error["code"], verdict.error["file"]) == (
        3,
        "index-invalid",
        str(tmp_path / "model" / INDEX),
    )


WRONG: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard that is missing": (lambda folder: (folder / SECOND).unlink(), "shard-missing"),
    "a shard that is a directory": (
        lambda folder: ((folder / SECOND).unlink(), (folder / SECOND).mkdir()),
        "shard-missing",
    ),
    "a file of config.json's bytes": (
        lambda folder: shutil.copy(folder / "config.json", folder / SECOND),
        "header-invalid",
    ),
    "a tensor that is nowhere": (names(SECOND), "index-mismatch"),
    "a tensor of a megabyte that is nowhere": (
        index(lambda value: value["weight_map"].update({"x" * 2**20: SECOND})),
        "index-mismatch",
    ),
    "a tensor that the index does not name": (
        index(lambda value: value["weight_map"].pop("lm_head.weight")),
        "index-mismatch",
    ),
    "the same tensors in two shards": (
        lambda folder: ((folder / INDEX).unlink(), shutil.copy(folder / SECOND, folder / "model-00003.safetensors")),
        "tensor-duplicate",
    ),
    "an extra shard": (lambda folder: shutil.copy(folder / SECOND, folder / "extra.safetensors"), "file-unused"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_index_that_contradicts_the_files_is_reported(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    corrupt, code = WRONG[name]
    verdict = judge(corrupted(tmp_path / "model", corrupt), capsys)
    assert verdict.codes == [code]
    if code == "file-unused":  # engines that follow the index are right, and so is the conversion
        assert (verdict.inspect, verdict.convert) == (0, 0)
    else:
        assert (verdict.inspect, verdict.convert, verdict.error["code"]) == (1, 3, code)


@pytest.mark.parametrize("size", [-1, 1.5, "12", True, [1], {"a": 1}, 2**63, float("nan"), float("inf")])
def test_an_invalid_total_size_is_reported_and_not_used(size: object, tmp_path: Path) -> None:
    folder = corrupted(tmp_path / "model", index(lambda value: value.update(metadata={"total_size": size})))
    inspection = inspect_checkpoint(folder)
    assert [(item.code, item.severity) for item in inspection.findings] == [("index-total-size", "info")]
    sound = inspect_checkpoint(corrupted(tmp_path / "sound", lambda _: None))
    assert inspection.to_json()["bytes"] == sound.to_json()["bytes"]


@pytest.mark.parametrize("size", [0, 1, 10**15, 12.0, None])
def test_a_total_size_that_is_wrong_is_not_used(size: object, tmp_path: Path) -> None:
    folder = corrupted(tmp_path / "model", index(lambda value: value.update(metadata={"total_size": size})))
    inspection = inspect_checkpoint(folder)
    assert inspection.findings == ()
    sound = inspect_checkpoint(corrupted(tmp_path / "sound", lambda _: None))
    assert inspection.to_json()["bytes"] == sound.to_json()["bytes"]
