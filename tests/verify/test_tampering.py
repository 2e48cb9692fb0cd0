"""Damage of every kind, done to a converted checkpoint: verify exits 1 and names the layer and the tensor."""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Callable
from pathlib import Path

import pytest
from support.exports import Checkpoints, Converted

import quarkconv
from quarkconv.cli.main import main

NAME = "qwen3_moe-quark0.13-f2f"
PREFIX = "model.layers.1.mlp.experts"


class Shard:
    """The one shard of a small converted checkpoint, as bytes that can be changed."""

    def __init__(self, model: Path) -> None:
        (self.path,) = model.glob("*.safetensors")
        self.data = bytearray(self.path.read_bytes())
        (length,) = struct.unpack("<Q", self.data[:8])
        self.entries = json.loads(self.data[8 : 8 + length])
        self.start = 8 + length

    def span(self, name: str, expert: int, part: int = 0, parts: int = 1) -> slice:
        """Bytes of a part of one expert in a tensor [E, ...]."""
        entry = self.entries[name]
        begin, end = (offset + self.start for offset in entry["data_offsets"])
        size = (end - begin) // entry["shape"][0] // parts
        first = begin + (expert * parts + part) * size
        return slice(first, first + size)

    def swap(self, one: slice, other: slice) -> None:
        self.data[one], self.data[other] = self.data[other], self.data[one]

    def save(self) -> None:
        self.path.write_bytes(self.data)


def exchange_gate_and_up(shard: Shard) -> str:
    name = f"{PREFIX}.gate_up_proj"
    shard.swap(shard.span(name, 3, 0, 2), shard.span(name, 3, 1, 2))
    return name


def exchange_gate_and_up_with_scales(shard: Shard) -> str:
    exchange_gate_and_up(shard)
    name = f"{PREFIX}.gate_up_proj_scale"
    shard.swap(shard.span(name, 3, 0, 2), shard.span(name, 3, 1, 2))
    return name


def exchange_two_experts(shard: Shard) -> str:
    for leaf in ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale"):
        shard.swap(shard.span(f"{PREFIX}.{leaf}", 2), shard.span(f"{PREFIX}.{leaf}", 5))
    return f"{PREFIX}.down_proj"


def zero_a_scale_row(shard: Shard) -> str:
    name = f"{PREFIX}.gate_up_proj_scale"
    row = shard.span(name, 0, 7, 2 * 96)
    shard.data[row] = bytes(4)
    return name


def shift_a_scale(shard: Shard) -> str:
    name = f"{PREFIX}.down_proj_scale"
    span = shard.span(name, 4)
    shard.data[span] = shard.data[span][4:] + shard.data[span][:4]
    return name


def flip_a_byte(shard: Shard) -> str:
    name = f"{PREFIX}.down_proj"
    shard.data[shard.span(name, 6).start + 1234] ^= 1
    return name


def take_another_layers_tensors(shard: Shard) -> str:
    for leaf in ("gate_up_proj", "gate_up_proj_scale", "down_proj", "down_proj_scale"):
        for expert in range(8):
            other = shard.span(f"model.layers.2.mlp.experts.{leaf}", expert)
            shard.data[shard.span(f"{PREFIX}.{leaf}", expert)] = shard.data[other]
    return f"{PREFIX}.gate_up_proj"


def truncate(shard: Shard) -> str:
    del shard.data[shard.span(f"{PREFIX}.gate_up_proj", 7).start :]
    return f"{PREFIX}.gate_up_proj"


def change_a_tensor_that_is_not_an_expert(shard: Shard) -> str:
    begin, _ = shard.entries["model.layers.1.self_attn.q_norm.weight"]["data_offsets"]
    shard.data[shard.start + begin] ^= 0x40
    return "model.layers.1.self_attn.q_norm.weight"


DAMAGES = [
    exchange_gate_and_up,
    exchange_gate_and_up_with_scales,
    exchange_two_experts,
    zero_a_scale_row,
    shift_a_scale,
    flip_a_byte,
    take_another_layers_tensors,
    truncate,
]


Damaged = Callable[[Callable[[Shard], str]], tuple[Path, str]]
"""A kind of damage -> a damaged conversion, and the tensor that is reported."""


@pytest.fixture
def damaged(converted: Converted, tmp_path: Path) -> Damaged:
    def make(damage: Callable[[Shard], str]) -> tuple[Path, str]:
        model = Path(shutil.copytree(converted(NAME), tmp_path / "model"))
        shard = Shard(model)
        tensor = damage(shard)
        shard.save()
        return model, tensor

    return make


@pytest.mark.parametrize("with_source", [True, False])
@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named(
    damage: Callable[[Shard], str],
    with_source: bool,
    damaged: Damaged,
    checkpoints: Checkpoints,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, tensor = damaged(damage)
    command = ["verify", str(model), "--json", "--device", "cpu"]
    if with_source:
        command += ["--source", str(checkpoints(NAME))]
    with pytest.raises(SystemExit) as exited:
        main(command)
    assert exited.value.code == 1
    problems = json.loads(capsys.readouterr().out)["problems"]
    assert (1, tensor) in {(problem["layer"], problem["tensor"]) for problem in problems}


@pytest.mark.parametrize("damage", [d for d in DAMAGES if d is not truncate])
def test_numbers_alone_find_it_against_the_source(
    damage: Callable[[Shard], str], damaged: Damaged, checkpoints: Checkpoints
) -> None:
    """Without a manifest, as if another tool had fused the experts: the source's experts show it."""
    model, _ = damaged(damage)
    (model / "quarkconv.json").unlink()
    result = quarkconv.verify_checkpoint(model, checkpoints(NAME), device="cpu")
    assert {(problem.stage, problem.layer) for problem in result.problems} == {("numbers", 1)}


def test_numbers_without_source_find_an_invalid_scale(damaged: Damaged) -> None:
    model, _ = damaged(zero_a_scale_row)
    (model / "quarkconv.json").unlink()
    result = quarkconv.verify_checkpoint(model, device="cpu")
    assert [problem.layer for problem in result.problems] == [1]
    assert "expert 0" in result.problems[0].message


def test_a_tensor_that_is_not_an_expert_is_watched_as_well(damaged: Damaged) -> None:
    model, tensor = damaged(change_a_tensor_that_is_not_an_expert)
    (problem,) = quarkconv.verify_checkpoint(model, device="cpu").problems
    assert (problem.stage, problem.tensor) == ("bytes", tensor)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors.index.json", "generation_config.json"])
def test_other_files_are_watched_as_well(file: str, converted: Converted, tmp_path: Path) -> None:
    model = Path(shutil.copytree(converted(NAME), tmp_path / "model"))
    text = (model / file).read_text()
    (model / file).write_text(text.replace("\n", " \n", 1))
    problems = quarkconv.verify_checkpoint(model, device="cpu").problems
    assert (problems[-1].stage, problems[-1].tensor) == ("bytes", file)


def test_a_header_that_was_written_anew_is_found(converted: Converted, tmp_path: Path) -> None:
    model = Path(shutil.copytree(converted(NAME), tmp_path / "model"))
    shard = Shard(model)
    position = shard.data.index(b'"format":"pt"')
    shard.data[position : position + 13] = b'"format":"np"'
    shard.save()
    (problem,) = quarkconv.verify_checkpoint(model, device="cpu").problems
    assert "header" in problem.message


def test_a_missing_shard_is_found(converted: Converted, tmp_path: Path) -> None:
    model = Path(shutil.copytree(converted(NAME), tmp_path / "model"))
    next(model.glob("*.safetensors")).unlink()
    result = quarkconv.verify_checkpoint(model, device="cpu")
    assert any("does not exist" in problem.message for problem in result.problems)
    assert result.numbers.skipped == "the structure is broken"


def test_a_manifest_of_another_conversion_does_not_pass(converted: Converted, tmp_path: Path) -> None:
    model = Path(shutil.copytree(converted(NAME), tmp_path / "model"))
    shutil.copy(converted("qwen3_moe-quark0.13-f2f-per_tensor_weight") / "quarkconv.json", model)
    assert not quarkconv.verify_checkpoint(model, device="cpu").ok
