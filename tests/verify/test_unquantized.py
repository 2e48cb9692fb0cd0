"""``--unquantized``: how far weights and outputs are from the model before it was quantized."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.checkpoints import Tensors
from support.exports import Checkpoints, Converted
from support.program import run_cli

import quarkconv
from quarkconv.description.description import describe
from quarkconv.verify.results import Verification

NAME = "qwen3_moe-quark0.13-f2f"


@pytest.fixture
def against(converted: Converted, checkpoints: Checkpoints) -> Verification:
    return quarkconv.verify_checkpoint(
        converted(NAME), device="cpu", unquantized=checkpoints("qwen3_moe-bf16"), layers={0}, tokens=40
    )


def test_errors_are_those_of_the_definition(
    against: Verification, converted: Converted, checkpoints: Checkpoints
) -> None:
    experts = quarkconv.load_fused_experts(converted(NAME), 0)
    weights: Tensors = {}
    for path in sorted(checkpoints("qwen3_moe-bf16").glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys() if ".layers.0." in name}  # noqa: SIM118
    found = against.numbers.experts[0].weights
    for role, rows in (("gate", slice(0, 96)), ("up", slice(96, 192))):
        for expert in (0, 7):
            original = weights[f"model.layers.0.mlp.experts.{expert}.{role}_proj.weight"].double()
            weight = experts.w13[expert, rows].double() * experts.w13_scale[expert, rows].double()
            expected = ((weight - original).norm() / original.norm()).item()
            assert found[role][expert].relative_error == pytest.approx(expected, rel=1e-9)
            assert found[role][expert].snr_db == pytest.approx(-20 * math.log10(expected), rel=1e-9)
            assert found[role][expert].clipped == 0
    assert 0.001 < expected < 0.02


def test_the_layer_is_compared_too(against: Verification) -> None:
    assert against.ok
    (layer,) = against.numbers.layers
    assert layer.unquantized is not None
    assert layer.dequantized.relative_error < layer.unquantized.relative_error < 0.06
    assert layer.unquantized.bound == math.inf


def test_the_worst_are_named(
    against: Verification, converted: Converted, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    worst = against.numbers.worst(5)
    errors = [item.error.relative_error for item in worst]
    assert errors == sorted(errors, reverse=True)
    everything = [e.relative_error for r in against.numbers.experts[0].weights.values() for e in r]
    assert errors[0] == max(everything)
    code, out, _ = run_cli(
        capsys, "verify", converted(NAME), "--unquantized", checkpoints("qwen3_moe-bf16"), "--layers", "0", "--device",
        "cpu", "--tokens", "40", "--json",
    )  # fmt: skip
    assert code == 0
    reported = json.loads(out)["numbers"]["worst"][0]
    assert (reported["layer"], reported["module"], reported["role"], reported["expert"]) == worst[0][:4]
    code, out, _ = run_cli(
        capsys, "verify", converted(NAME), "--unquantized", checkpoints("qwen3_moe-bf16"), "--layers", "0", "--device",
        "cpu", "--tokens", "40",
    )  # fmt: skip
    assert f"expert {worst[0].expert}" in out


def test_weights_of_another_model_are_a_problem(converted: Converted, checkpoints: Checkpoints, tmp_path: Path) -> None:
    other = checkpoints.copy("qwen3_moe-bf16", tmp_path / "other")
    description = describe(other)
    refs = description.checkpoint.refs()
    one, two = (refs[f"model.layers.0.mlp.experts.{expert}.up_proj.weight"] for expert in (2, 5))
    data = [(other / ref.file).read_bytes()[ref.start : ref.end] for ref in (one, two)]
    for ref, swapped in zip((one, two), reversed(data), strict=True):
        with open(other / ref.file, "r+b") as file:
            file.seek(ref.start)
            file.write(swapped)
    result = quarkconv.verify_checkpoint(converted(NAME), device="cpu", unquantized=other, layers={0})
    (problem,) = result.problems
    assert problem.count == 2
    assert "not the unquantized model's" in problem.message
    assert ".2 (up)" in problem.tensor or ".5 (up)" in problem.tensor


def test_the_router_of_another_model_is_a_problem(
    converted: Converted, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    other = checkpoints.copy("qwen3_moe-bf16", tmp_path / "other")
    refs = describe(other).checkpoint.refs()
    ref = refs["model.layers.0.mlp.gate.weight"]
    with open(other / ref.file, "r+b") as file:
        file.seek(ref.start)
        rows = file.read(ref.nbytes)
        width = len(rows) // 8
        file.seek(ref.start)
        file.write(rows[width:] + rows[:width])  # the same rows, each for another expert
    result = quarkconv.verify_checkpoint(converted(NAME), device="cpu", unquantized=other, layers={0})
    (problem,) = result.problems
    assert (problem.stage, problem.tensor) == ("numbers", "model.layers.0.mlp")
    assert "The router is not the unquantized model's" in problem.message


def test_the_verdict_says_which_weights_are_not_compared(against: Verification) -> None:
    assert against.ok
    assert "not checked" in against.verdict()
    assert "not checked: norms, embeddings and linears in float against the unquantized model's" in against.verdict()


def test_stacked_experts_are_read_as_well(converted: Converted, checkpoints: Checkpoints, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    source = checkpoints("qwen3_moe-bf16")
    tensors: Tensors = {}
    for path in sorted(source.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if ".layers.0." in name}  # noqa: SIM118
    prefix = "model.layers.0.mlp.experts"
    gate_up = torch.stack([
        torch.cat([tensors.pop(f"{prefix}.{e}.gate_proj.weight"), tensors.pop(f"{prefix}.{e}.up_proj.weight")])
        for e in range(8)
    ])  # fmt: skip
    down = torch.stack([tensors.pop(f"{prefix}.{e}.down_proj.weight") for e in range(8)])
    stacked = tmp_path / "stacked"
    stacked.mkdir()
    save_file(
        {**tensors, f"{prefix}.gate_up_proj": gate_up, f"{prefix}.down_proj": down}, stacked / "model.safetensors"
    )
    (stacked / "config.json").write_text((source / "config.json").read_text())
    options: dict[str, Any] = {"device": "cpu", "layers": {0}, "tokens": 8}
    one = quarkconv.verify_checkpoint(converted(NAME), unquantized=source, **options)
    other = quarkconv.verify_checkpoint(converted(NAME), unquantized=stacked, **options)
    assert one.numbers.experts == other.numbers.experts
    assert one.numbers.layers[0].unquantized == other.numbers.layers[0].unquantized


def test_an_unquantized_model_that_does_not_fit(converted: Converted, checkpoints: Checkpoints) -> None:
    with pytest.raises(quarkconv.UsageError, match="in float with this shape"):
        quarkconv.verify_checkpoint(converted(NAME), device="cpu", unquantized=checkpoints(NAME))


@pytest.mark.parametrize("option", ["unquantized", "source"])
@pytest.mark.parametrize("damage", ["cut", "cut in its header", "missing"])
def test_a_model_to_compare_with_whose_files_are_damaged_is_named(
    option: str, damage: str, converted: Converted, checkpoints: Checkpoints, tmp_path: Path
) -> None:
    other = shutil.copytree(checkpoints("qwen3_moe-bf16" if option == "unquantized" else NAME), tmp_path / "other")
    shard = sorted(other.glob("*.safetensors"))[0]
    if damage == "missing":
        (other / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "a.safetensors"}}))
        shard = other / "a.safetensors"
    else:
        os.truncate(shard, 100 if "header" in damage else shard.stat().st_size - 1)
    given: dict[str, Any] = {option: other}
    with pytest.raises(quarkconv.SourceError) as caught:
        quarkconv.verify_checkpoint(converted(NAME), device="cpu", layers={0}, **given)
    assert (caught.value.file, caught.value.tensor) == (str(shard), None)
