"""A plan is pure data: made from headers, the same wherever the files lie, and it uses every weight once."""

from __future__ import annotations

import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import edit_checkpoint, load, make_checkpoint, write_checkpoint
from support.expected import fused_int8
from support.exports import CONVERTIBLE, REFUSED, Checkpoints

import quarkconv
from quarkconv.errors import QuarkconvError, SourceError, UnsupportedError, UsageError
from quarkconv.plan.plan import Plan, plan_digest
from quarkconv.plan.shards import natural_key


def plan(root: Path, **options: Any) -> Plan:
    return quarkconv.plan_conversion(root, "fused-int8", **options)


def outputs(planned: Plan) -> dict[str, tuple[str, tuple[int, ...]]]:
    return {item.name: (item.dtype, item.shape) for shard in planned.shards for item in shard.tensors}


def test_every_export_is_either_convertible_or_refused() -> None:
    from support.exports import EXPORTS, FIXTURES

    assert sorted((*CONVERTIBLE, *REFUSED)) == sorted(FIXTURES | EXPORTS)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_the_plan_names_dtypes_and_shapes_of_the_oracle(checkpoints: Checkpoints, name: str) -> None:
    root = checkpoints(name)
    dtypes = {torch.int8: "I8", torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}
    expected = {key: (dtypes[value.dtype], tuple(value.shape)) for key, value in fused_int8(root).items()}
    planned = plan(root)
    assert outputs(planned) == expected
    assert planned.tensor_bytes == sum(item.nbytes for shard in planned.shards for item in shard.tensors)
    names = [item.name for shard in plan(root, max_shard_size=1).shards for item in shard.tensors]
    assert names == sorted(names, key=natural_key)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_every_byte_of_the_source_is_used_once(checkpoints: Checkpoints, name: str) -> None:
    root = checkpoints(name)
    planned = plan(root)
    ranges: dict[str, list[tuple[int, int]]] = {}
    for shard in planned.shards:
        for item in shard.tensors:
            for piece in item.pieces:
                for source in piece.reads():
                    ranges.setdefault(source.file, []).append((source.start, source.start + source.nbytes))
    for file, pieces in ranges.items():
        ordered = sorted(pieces)
        assert all(first[1] <= second[0] for first, second in pairwise(ordered)), file
    # What is left out: zero points, and the input scales of up, which equal those of gate.
    kept = {
        name: value
        for name, value in load(root).items()
        if not name.endswith("_zero_point") and not re.search(r"experts\.\d+\.(up_proj|w3)\.input_scale$", name)
    }
    total = sum(value.numel() * value.element_size() for value in kept.values())
    assert sum(end - start for pieces in ranges.values() for start, end in pieces) == total


def test_planning_reads_no_tensor_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    root = make_checkpoint(tmp_path / "model", layers=2, zero_points=True, scale_dtype=torch.bfloat16)
    expected = plan(root)
    for file in root.glob("*.safetensors"):  # keep the header, put holes where the data was
        size = file.stat().st_size
        with open(file, "r+b") as handle:
            header = 8 + int.from_bytes(handle.read(8), "little")
            handle.truncate(header)
            handle.truncate(size)
    for name in ("pread", "preadv", "sendfile", "copy_file_range"):
        monkeypatch.delattr(os, name)
    assert plan(root) == expected


def test_a_checkpoint_far_larger_than_the_disk_can_be_planned(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", experts=2, shards=1)
    (file,) = root.glob("*.safetensors")
    raw = file.read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    position = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if name == "model.embed_tokens.weight":
            entry["shape"] = [2**20, 2**20]  # 2 TiB
        size = {"I8": 1, "BF16": 2, "F32": 4}[entry["dtype"]] * torch.Size(entry["shape"]).numel()
        entry["data_offsets"] = [position, position + size]
        position += size
    text = json.dumps(header).encode()
    with open(file, "wb") as handle:
        handle.write(len(text).to_bytes(8, "little") + text)
        handle.truncate(8 + len(text) + position)
    assert plan(root).output_bytes > 2**41


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_a_plan_survives_json(checkpoints: Checkpoints, name: str) -> None:
    planned = plan(checkpoints(name))
    again = Plan.from_json(json.loads(json.dumps(planned.to_json())))
    assert again == planned
    assert plan_digest(again) == plan_digest(planned)


def test_the_digest_does_not_depend_on_where_the_source_lies(checkpoints: Checkpoints, tmp_path: Path) -> None:
    root = checkpoints("mixtral-quark0.11-eager")
    elsewhere = tmp_path / "some where" / "else"
    shutil.copytree(root, elsewhere)
    assert plan(elsewhere) == plan(root)
    assert plan_digest(plan(elsewhere)) == plan_digest(plan(root)) == plan_digest(plan(root))


def test_the_digest_distinguishes_options_and_sources(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    digests = [plan_digest(plan(root)), plan_digest(plan(root, max_shard_size="1KB"))]
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "rope_theta": 1e6}))
    digests.append(plan_digest(plan(root)))
    (root / "tokenizer.json").write_text("{}")
    digests.append(plan_digest(plan(root)))
    digests.append(plan_digest(plan(make_checkpoint(tmp_path / "wider", intermediate=28))))
    digests.append(plan_digest(plan(make_checkpoint(tmp_path / "narrow", scale_dtype=torch.bfloat16))))
    assert len(set(digests)) == len(digests)


@pytest.mark.parametrize(("name", "exit_code", "words"), [(name, *refusal) for name, refusal in REFUSED.items()])
def test_refused_exports_give_a_reason(checkpoints: Checkpoints, name: str, exit_code: int, words: str) -> None:
    root = checkpoints(name)
    with pytest.raises(QuarkconvError, match=words) as caught:
        plan(root)
    assert caught.value.exit_code == exit_code
    assert isinstance(caught.value, SourceError if exit_code == 3 else UnsupportedError)
    about_config = words in ("quant-config-missing", "not-moe")
    assert caught.value.file == str(root / "config.json" if about_config else root)
    assert caught.value.hint


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("mixtral-quark0.13-eager-experts_left_bf16", "convert with --quantize missing"),
        ("qwen3_moe-0.13-f2f-some_experts_excluded", "quantize all experts of a layer"),
        ("qwen3_moe-0.11-eager-asymmetric", "supported: symmetric int8 weights"),
    ],
)
def test_a_refusal_names_the_way_out_that_inspect_names(checkpoints: Checkpoints, name: str, advice: str) -> None:
    with pytest.raises(UnsupportedError) as caught:
        plan(checkpoints(name))
    assert (caught.value.hint or "").startswith(advice)


def remove_scale(root: Path) -> None:
    edit_checkpoint(root, lambda tensors: tensors.pop("model.layers.0.mlp.experts.1.up_proj.weight_scale"))


def remove_projection(root: Path) -> None:
    edit_checkpoint(root, lambda tensors: tensors.pop("model.layers.0.mlp.experts.1.up_proj.weight"))


def reshape_projection(root: Path) -> None:
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    edit_checkpoint(root, lambda tensors: tensors.update({name: tensors[name][:-1]}))


def lose_shard(root: Path) -> None:
    (root / "model-00002-of-00002.safetensors").unlink()


def truncate_shard(root: Path) -> None:
    file = root / "model-00001-of-00002.safetensors"
    os.truncate(file, file.stat().st_size - 1)


def lengthen_shard(root: Path) -> None:
    with open(root / "model-00001-of-00002.safetensors", "ab") as handle:
        handle.write(b"x")


def break_config(root: Path) -> None:
    (root / "config.json").write_text("{")


def break_index(root: Path) -> None:
    path = root / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.norm.weight"] = "model-00001-of-00002.safetensors"
    index["weight_map"]["lm_head.weight"] = "model-00002-of-00002.safetensors"
    path.write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("damage", "code"),
    [
        (remove_scale, "scale-missing"),
        (remove_projection, "expert-missing"),
        (reshape_projection, "expert-shape"),
        (lose_shard, "shard-missing"),
        (truncate_shard, "shard-truncated"),
        (lengthen_shard, "header-invalid"),
        (break_config, "config-invalid"),
        (break_index, "index-mismatch"),
    ],
)
def test_damaged_sources_are_refused_with_the_code_of_inspect(tmp_path: Path, damage: Any, code: str) -> None:
    root = make_checkpoint(tmp_path / "model")
    damage(root)
    with pytest.raises(SourceError) as caught:
        plan(root)
    assert caught.value.code == code
    assert code in {item.code for item in quarkconv.inspect_checkpoint(root).findings}


def test_a_directory_that_is_not_there_is_a_source_error(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="model directory does not exist"):
        plan(tmp_path / "nothing")


def test_a_name_that_the_target_needs_is_not_overwritten(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    tensors = load(root)
    tensors["model.layers.0.mlp.experts.gate_up_proj_scale"] = torch.ones(3)
    write_checkpoint(root, tensors, json.loads((root / "config.json").read_text()), 2)
    with pytest.raises(UnsupportedError, match="already has a tensor"):
        plan(root)


@pytest.mark.parametrize("size", [0, -1, "0", "0GB"])
def test_a_shard_size_must_be_positive(tmp_path: Path, size: int | str) -> None:
    with pytest.raises(UsageError):
        plan(make_checkpoint(tmp_path / "model"), max_shard_size=size)


@pytest.mark.parametrize("size", ["5 GB extra", "GB", "five", "1e9", "5PB", ""])
def test_an_invalid_size_is_a_usage_error(tmp_path: Path, size: str) -> None:
    with pytest.raises(UsageError, match="Invalid --max-shard-size"):
        plan(make_checkpoint(tmp_path / "model"), max_shard_size=size)


@pytest.mark.parametrize(
    ("size", "nbytes"), [("5GB", 5 * 10**9), ("1.5 kB", 1500), ("512MiB", 512 * 2**20), ("77", 77), (77, 77)]
)
def test_sizes_are_decimal_or_binary(tmp_path: Path, size: int | str, nbytes: int) -> None:
    assert plan(make_checkpoint(tmp_path / "model"), max_shard_size=size).max_shard_size == nbytes


@pytest.mark.parametrize(
    "change",
    [
        {"format": 2},
        {"format": None},
        {"sources": [["a"]]},
        {"shards": [{"file": "x"}]},
        {"moe": {}},
        {"checks": [["zero", ["t", 99, 0, 0], None]]},
    ],
)
def test_an_invalid_plan_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    value = json.loads(json.dumps(plan(make_checkpoint(tmp_path / "model")).to_json()))
    with pytest.raises(SourceError) as caught:
        Plan.from_json({**value, **change})
    assert caught.value.code == "plan-invalid"


@pytest.mark.parametrize("file", [b"bad-\xff.txt", b"back\\slash.txt"])
def test_a_file_name_that_json_cannot_hold_is_refused_before_anything_is_written(tmp_path: Path, file: bytes) -> None:
    root = make_checkpoint(tmp_path / "model")
    (root / os.fsdecode(file)).write_text("x")
    with pytest.raises(UnsupportedError, match="name"):
        plan(root)
