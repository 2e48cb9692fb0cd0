"""Layers by number or by module: numbers where only one layer has them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import make_checkpoint
from support.exports import Checkpoints
from support.program import run_cli
from support.stacked import all_tensors, stacked_experts

import quarkconv
from quarkconv.description.description import describe

TALKER, THINKER = "talker.model.layers.0.mlp", "thinker.model.layers.0.mlp"


@pytest.fixture(scope="module")
def two_stacks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with two stacks of MoE layers, of different sizes, as a thinker and a talker."""
    folder = tmp_path_factory.mktemp("two")
    tensors: dict[str, torch.Tensor] = {}
    for name, hidden in (("thinker", 32), ("talker", 16)):
        part = make_checkpoint(folder / name, experts=4, hidden=hidden, intermediate=16, seed=hidden)
        tensors |= {f"{name}.{key}": value for key, value in all_tensors(part).items()}
    model = folder / "model"
    model.mkdir()
    save_file(tensors, model / "model.safetensors")
    (model / "config.json").write_text((folder / "thinker" / "config.json").read_text())
    return model


def test_a_module_names_one_of_two_layers_with_the_same_number(two_stacks: Path) -> None:
    layers = {layer.moe: layer for layer in describe(two_stacks).moe_layers}
    assert set(layers) == {TALKER, THINKER}
    for module in (TALKER, THINKER, f"{TALKER}.experts"):
        experts = quarkconv.load_fused_experts(two_stacks, module)
        expected = stacked_experts(two_stacks, layers[module.removesuffix(".experts")])
        assert expected["w13"] is not None
        assert torch.equal(experts.w13, expected["w13"])
        assert experts.module == f"{module.removesuffix('.experts')}.experts"


def test_a_number_of_two_layers_is_refused_and_the_modules_are_listed(two_stacks: Path) -> None:
    with pytest.raises(quarkconv.UsageError, match="Several MoE layers have number 0") as caught:
        quarkconv.load_fused_experts(two_stacks, 0)
    assert caught.value.found is not None
    assert set(caught.value.found.split(", ")) == {TALKER, THINKER}
    with pytest.raises(quarkconv.UsageError, match="Several MoE layers have number 0"):
        quarkconv.verify_checkpoint(two_stacks, device="cpu", layers=[0])


def test_an_unknown_layer_is_refused_with_those_that_there_are(two_stacks: Path, checkpoints: Checkpoints) -> None:
    for name in ("talker.model.layers.1.mlp", 3):
        with pytest.raises(quarkconv.UsageError, match="No such MoE layer") as caught:
            quarkconv.load_fused_experts(two_stacks, name)
        assert caught.value.expected is not None
        assert set(caught.value.expected.split(", ")) == {TALKER, THINKER}
    with pytest.raises(quarkconv.UsageError) as caught:
        quarkconv.load_fused_experts(checkpoints("qwen3_moe-quark0.13-f2f"), 7)
    assert caught.value.expected == "0, 1, 2"


def test_verify_takes_modules_and_names_them_beside_the_number(
    two_stacks: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _, out, _ = run_cli(capsys, "verify", two_stacks, "--device", "cpu", "--layers", TALKER, "--json")
    numbers = json.loads(out)["numbers"]
    assert [(layer["layer"], layer["module"]) for layer in numbers["experts"]] == [(0, f"{TALKER}.experts")]
    assert {layer["module"] for layer in numbers["layers"]} <= {f"{TALKER}.experts"}


def test_layers_of_one_number_are_shown_by_module(two_stacks: Path) -> None:
    numbers = quarkconv.verify_checkpoint(two_stacks, device="cpu").numbers
    labels = {numbers.label(item.layer, item.module) for item in numbers.experts}
    assert labels == {f"{TALKER}.experts", f"{THINKER}.experts"}
