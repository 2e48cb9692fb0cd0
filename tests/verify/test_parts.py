"""``verify --part``: every part checks its share, and their results merge into that of one process."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import make_checkpoint
from support.exports import Checkpoints, Converted
from support.program import run_cli

import quarkconv
from quarkconv.description.description import describe
from quarkconv.errors import UsageError
from quarkconv.plan.manifest import read_manifest
from quarkconv.plan.shares import Share
from quarkconv.verify.merged import merged, verification_from_json
from quarkconv.verify.parts import scope_of

Capture = pytest.CaptureFixture[str]
OPTIONS: dict[str, Any] = {"device": "cpu", "tokens": (4, 9)}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parts")
    source = make_checkpoint(folder / "model", layers=3, experts=4, hidden=64, intermediate=48, shards=2)
    return quarkconv.convert_checkpoint(source, "fused-int8", folder / "out", max_shard_size=30_000).output


def parts(model: Path, count: int, **options: Any) -> dict[str, dict[str, Any]]:
    """The results of all parts as they are read back from files."""
    found = {}
    for number in range(count, 0, -1):
        result = quarkconv.verify_checkpoint(model, share=Share(number, count), **{**OPTIONS, **options})
        found[f"part-{number}.json"] = json.loads(json.dumps(result.to_json()))
    return found


def comparable(value: dict[str, Any]) -> dict[str, Any]:
    """A result without its times."""
    value = json.loads(json.dumps(value))
    for layer in value["numbers"]["layers"]:
        del layer["seconds"]
    return value


@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_every_tensor_header_file_and_layer_is_in_one_part(model: Path, count: int) -> None:
    description, manifest = describe(model), read_manifest(model)
    assert manifest is not None
    scopes = [
        scope_of(description, manifest, description.int8_layers, Share(number, count)) for number in range(1, count + 1)
    ]
    expected = [
        *(tensor.name for shard in manifest.shards for tensor in shard.tensors),
        *(shard.file for shard in manifest.shards),
        *(file.name for file in manifest.files),
    ]
    assert sorted(name for scope in scopes for name in scope.names or ()) == sorted(expected)
    layers = [layer.prefix for scope in scopes for layer in scope.layers]
    assert sorted(layers) == sorted(layer.prefix for layer in description.int8_layers)
    assert sum(scope.nbytes for scope in scopes) == sum(shard.size for shard in manifest.shards)


@pytest.mark.parametrize(
    ("count", "options"),
    [(1, {}), (5, {}), (2, {"stages": ["bytes"]}), (2, {"stages": ["numbers"]}), (2, {"layers": {1}})],
)
def test_merged_parts_are_the_result_of_one_process(model: Path, count: int, options: dict[str, Any]) -> None:
    whole = quarkconv.verify_checkpoint(model, **{**OPTIONS, **options})
    found = merged(parts(model, count, **options))
    assert comparable(found) == comparable(whole.to_json())
    assert comparable(verification_from_json(found).to_json()) == comparable(whole.to_json())
    assert verification_from_json(found).verdict() == whole.verdict()


def test_parts_with_a_source_and_an_unquantized_model_merge(converted: Converted, checkpoints: Checkpoints) -> None:
    name, unquantized = "qwen3_moe-quark0.13-f2f", checkpoints("qwen3_moe-bf16")
    options = {"source": checkpoints(name), "unquantized": unquantized}
    whole = quarkconv.verify_checkpoint(converted(name), **{**OPTIONS, **options})
    found = merged(parts(converted(name), 2, **options))
    assert comparable(found) == comparable(whole.to_json())
    assert len(found["numbers"]["worst"]) == 10
    assert verification_from_json(found).numbers.worst(1)[0].layer == found["numbers"]["worst"][0]["layer"]


def test_a_problem_in_any_part_is_in_the_merged_result(model: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in model.iterdir():
        (broken / path.name).write_bytes(path.read_bytes())
    for path in sorted(broken.glob("*.safetensors"))[::2]:
        data = bytearray(path.read_bytes())
        data[-1] ^= 1
        path.write_bytes(data)
    (broken / "config.json").write_text((broken / "config.json").read_text() + " ")
    whole = quarkconv.verify_checkpoint(broken, **OPTIONS).to_json()
    found = merged(parts(broken, 3))
    assert not found["ok"]

    def listed(value: dict[str, Any]) -> list[str]:
        return sorted(json.dumps(problem) for problem in value["problems"])

    assert listed(found) == listed(whole)
    assert len({problem["stage"] for problem in found["problems"]}) > 1


def test_an_export_without_a_manifest_is_verified_in_parts(checkpoints: Checkpoints) -> None:
    folder = checkpoints("qwen3_moe-quark0.13-f2f")
    whole = quarkconv.verify_checkpoint(folder, **OPTIONS)
    assert comparable(merged(parts(folder, 2))) == comparable(whole.to_json())


def test_parts_that_do_not_belong_together_are_refused(model: Path, checkpoints: Checkpoints) -> None:
    quick: dict[str, Any] = {"stages": ["bytes"]}
    two = parts(model, 2, **quick)
    with pytest.raises(UsageError, match="missing") as caught:
        merged({"a": two["part-2.json"]})
    assert caught.value.hint == "run --part 1/2"
    with pytest.raises(UsageError, match="missing"):
        merged({})
    with pytest.raises(UsageError, match="twice"):
        merged({"a": two["part-1.json"], "b": two["part-1.json"]})
    for other, label in (
        (parts(model, 3, **quick)["part-1.json"], "number of parts"),
        (parts(model, 2, seed=1, **quick)["part-1.json"], "--seed"),
        (parts(model, 2, tokens=5, **quick)["part-1.json"], "--tokens"),
        (parts(model, 2, stages=[])["part-1.json"], "stages"),
        (parts(checkpoints("qwen3_moe-quark0.13-f2f"), 2, **quick)["part-1.json"], "plan of the conversion"),
    ):
        with pytest.raises(UsageError, match="different verifications") as caught:
            merged({"b": two["part-2.json"], "a": other})
        assert label in (caught.value.expected or "")
        assert caught.value.file == "a"
    whole = quarkconv.verify_checkpoint(model, **OPTIONS, **quick).to_json()
    damaged = {**two["part-1.json"], "numbers": []}
    identity = two["part-1.json"]["part"]["identity"]
    without_number = ({"identity": identity, "count": 2}, {"identity": identity, "count": 2, "number": [1]})
    for value in (whole, {}, *({**two["part-1.json"], "part": part} for part in (1, *without_number))):
        with pytest.raises(UsageError, match="not the result of a part"):
            merged({"a": value})
    with pytest.raises(UsageError, match="not the result of a part"):
        merged({"a": damaged, "b": two["part-2.json"]})


def test_a_part_that_lacks_a_layer_is_refused(model: Path) -> None:
    """Its file was cut: merged, the rest would count as the whole."""
    found = parts(model, 2, tokens=(4,))
    del found["part-2.json"]["numbers"]["layers"][0]
    with pytest.raises(UsageError, match="not the result of a part") as caught:
        merged(found)
    assert "numbers of 2 layers, expected 3" in (caught.value.found or "")


def test_the_commands_verify_and_merge_parts(model: Path, tmp_path: Path, capsys: Capture) -> None:
    files = []
    for number in (1, 2):
        code, out, _ = run_cli(capsys, "verify", model, "--part", f"{number}/2", "--json", "--device", "cpu")
        assert code == 0
        files.append(tmp_path / f"{number}.json")
        files[-1].write_text(out)
    code, out, _ = run_cli(capsys, "merge", *files, "--json")
    assert (code, json.loads(out)["ok"]) == (0, True)
    assert "part" not in json.loads(out)
    code, out, _ = run_cli(capsys, "merge", *files)
    assert code == 0
    assert "Verified" in out
    assert run_cli(capsys, "merge", files[0])[0] == 2
    assert run_cli(capsys, "merge", tmp_path / "none.json")[0] == 2
    assert run_cli(capsys, "verify", model, "--part", "3/2")[0] == 2
    code, out, _ = run_cli(capsys, "verify", model, "--part", "1/2", "--device", "cpu")
    assert "Part 1 of 2: Verified; the other parts: not checked here" in " ".join(out.split())
