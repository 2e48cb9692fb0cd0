"""Families that no export in tests/data has, in the names of their published checkpoints: read, converted, computed.

transformers has no class of these for Quark to export. Names and router tensors are those that vLLM 0.33 and SGLang
0.5.23 load; the routing of each is compared with its own code in test_routing.py.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Final

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import Tensors, load
from support.exports import DATA
from support.published import EXPERTS, HIDDEN, INNER, PUBLISHED, SIZES

import quarkconv
from quarkconv.description.description import describe
from quarkconv.targets import TARGETS

NOT_FUSED: Final = {"grok-1": "linear/linear_v/linear_1"}


@pytest.mark.parametrize("name", PUBLISHED)
def test_config_and_tensors_are_understood(name: str, tmp_path: Path) -> None:
    published = PUBLISHED[name]
    description = describe(published.write(tmp_path / "source"))
    assert description.errors() == []
    (layer,) = description.int8_layers
    assert (layer.moe, layer.geometry) == (published.moe, (EXPERTS, published.width, INNER))


@pytest.mark.parametrize("name", PUBLISHED)
def test_verify_computes_routing_and_activation(name: str, tmp_path: Path) -> None:
    result = quarkconv.verify_checkpoint(PUBLISHED[name].write(tmp_path / "source"), device="cpu", tokens=16)
    assert result.problems == ()
    (numbers,) = result.numbers.layers
    assert numbers.activation == PUBLISHED[name].activation
    assert numbers.routing.startswith("the model's own: ")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", PUBLISHED)
def test_every_target_keeps_the_experts(name: str, target: str, tmp_path: Path) -> None:
    source = PUBLISHED[name].write(tmp_path / "source")
    if target == "fused-int8" and name in NOT_FUSED:
        with pytest.raises(quarkconv.UnsupportedError, match=NOT_FUSED[name]):
            quarkconv.plan_conversion(source, target)
        return
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out").output
    assert quarkconv.verify_checkpoint(out, source, device="cpu", tokens=4).problems == ()
    before, after = load(source), load(out)
    if target not in ("fused-int8", "bf16"):
        codes = [name for name, tensor in before.items() if tensor.dtype == torch.int8]
        assert len(codes) == 3 * EXPERTS
        assert all(torch.equal(after[name], before[name]) for name in codes)


GRANITE: Final = DATA / "families" / "granitemoehybrid-0.13-eager"


def paired(tensors: Tensors, scale_shape: str) -> Tensors:
    """The experts of an export as granite publishes them: `input_linear` with gate before up, and `output_linear`."""
    found = {name: tensor for name, tensor in tensors.items() if ".block_sparse_moe.experts." not in name}
    moe = "model.layers.0.block_sparse_moe"
    for name, leaves in (("input_linear", ("gate_proj", "up_proj")), ("output_linear", ("down_proj",))):
        for end in ("weight", "weight_scale", *(["weight_zero_point"] if scale_shape == "[E, out]" else [])):
            parts = [
                torch.cat([tensors[f"{moe}.experts.{expert}.{leaf}.{end}"] for leaf in leaves]) for expert in range(4)
            ]
            stacked = torch.stack(parts)
            found[f"{moe}.{name}.{end}"] = (
                stacked.unsqueeze(-1) if stacked.ndim == 2 and scale_shape == "[E, out, 1]" else stacked
            )
    return found


@pytest.mark.parametrize("scale_shape", ["[E, out]", "[E, out, 1]"])
@pytest.mark.parametrize("target", TARGETS)
def test_experts_in_two_linears_of_three_dimensions_are_those_of_the_same_model_one_by_one(
    target: str, scale_shape: str, tmp_path: Path
) -> None:
    """granitemoehybrid as it is published, in int8; vLLM's granitemoehybrid.py loads scales of [E, out, 1]."""
    source = tmp_path / "source"
    source.mkdir()
    save_file(paired(load(GRANITE), scale_shape), source / "model.safetensors")
    shutil.copy(GRANITE / "config.json", source)
    inspection = quarkconv.inspect_checkpoint(source, deep=True)
    assert inspection.headline.startswith("Sound")
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out").output
    found, expected = load(out), load(quarkconv.convert_checkpoint(GRANITE, target, tmp_path / "expected").output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    verified = quarkconv.verify_checkpoint(out, source, device="cpu", tokens=8)
    assert verified.problems == ()
    assert verified.numbers.skipped is None or target == "bf16"
    assert quarkconv.verify_checkpoint(source, device="cpu", tokens=8).numbers.layers[0].ok


def test_float_experts_in_two_linears_of_three_dimensions_are_quantized_along_their_rows(tmp_path: Path) -> None:
    moe = "model.layers.0.block_sparse_moe"
    random = torch.Generator().manual_seed(1)
    tensors: Tensors = {f"{moe}.router.layer.weight": torch.randn(EXPERTS, HIDDEN, generator=random).bfloat16()}
    for leaf, shape in (("input_linear", (EXPERTS, 2 * INNER, HIDDEN)), ("output_linear", (EXPERTS, HIDDEN, INNER))):
        tensors[f"{moe}.{leaf}.weight"] = torch.randn(shape, generator=random).bfloat16()
    source = tmp_path / "source"
    source.mkdir()
    save_file(tensors, source / "model.safetensors")
    config = {"model_type": "granitemoehybrid", **SIZES, "num_local_experts": EXPERTS, "num_experts_per_tok": 2}
    (source / "config.json").write_text(json.dumps(config))
    out = quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "out", quantize="all").output
    found = load(out)
    for name, part in (("gate_proj", slice(INNER)), ("up_proj", slice(INNER, None))):
        weight = tensors[f"{moe}.input_linear.weight"][1, part].double()
        scale = found[f"{moe}.experts.1.{name}.weight_scale"].double()
        assert (found[f"{moe}.experts.1.{name}.weight"] * scale - weight).abs().max() <= scale.max()
    assert quarkconv.verify_checkpoint(out, source, unquantized=source, device="cpu", tokens=8).ok
