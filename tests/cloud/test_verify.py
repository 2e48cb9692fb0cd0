"""``verify`` of checkpoints in object stores: what it finds of the same files in a directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.exports import Checkpoints, Converted
from support.faulty_proxy import FaultyProxy
from support.program import run_cli
from support.s3 import OUT, URL, publish

import quarkconv

pytestmark = pytest.mark.long(10)

Capture = pytest.CaptureFixture[str]


def verified(capsys: Capture, *words: str | Path) -> tuple[int, dict[str, Any]]:
    """The exit code of ``verify`` and its answer, without what names and times differ in."""
    code, out, _ = run_cli(capsys, "verify", *words, "--json", "--device", "cpu", "--tokens", "4")
    value = json.loads(out)
    for layer in value.get("numbers", {}).get("layers", ()):
        del layer["seconds"]
    for name in ("model", "source", "unquantized"):
        value.pop(name, None)
    return code, value


@pytest.mark.usefixtures("published")
@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "bf16"])
def test_the_answer_is_that_of_the_directory(model: Path, tmp_path: Path, capsys: Capture, target: str) -> None:
    out = tmp_path / "out"
    quarkconv.convert_checkpoint(model, target, out, max_shard_size=40_000)
    publish(out, OUT)
    local = verified(capsys, out, "--source", model)
    assert verified(capsys, OUT, "--source", URL) == local
    assert local[0] == 0
    assert verified(capsys, OUT) == verified(capsys, out)


def test_a_byte_that_differs_is_found(published: FaultyProxy, model: Path, tmp_path: Path, capsys: Capture) -> None:
    out = tmp_path / "out"
    manifest = quarkconv.convert_checkpoint(model, "fused-int8", out, max_shard_size=40_000).manifest
    shard = out / manifest.shards[0].file
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    (out / "tokenizer" / "vocabulary.txt").write_text("a b d")
    publish(out, OUT)
    code, value = verified(capsys, OUT)
    assert (code, value["ok"]) == (1, False)
    assert (code, value) == verified(capsys, out)
    assert {problem["tensor"] for problem in value["problems"]} >= {"tokenizer/vocabulary.txt"}
    published.lie = True
    assert verified(capsys, OUT)[0] == 3


@pytest.mark.usefixtures("proxy")
def test_an_unquantized_model_may_lie_there_too(
    converted: Converted, checkpoints: Checkpoints, capsys: Capture
) -> None:
    model, unquantized = converted("qwen3_moe-quark0.13-f2f"), checkpoints("qwen3_moe-bf16")
    publish(model, OUT)
    publish(unquantized, URL)
    code, value = verified(capsys, OUT, "--unquantized", URL, "--layers", "0")
    assert code == 0
    assert value["numbers"]["experts"][0]["weights"]
    assert (code, value) == verified(capsys, model, "--unquantized", unquantized, "--layers", "0")
