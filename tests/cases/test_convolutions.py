"""Convolutions in int8: Quark quantizes every weight of two or more dimensions file to file, engines only linears."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load
from support.exports import DATA

import quarkconv
from quarkconv.targets import TARGETS

FAMILIES = DATA / "families"
CONVOLUTIONS: dict[str, tuple[str, str, tuple[int, ...]]] = {
    "of one channel each": ("qwen3_next-0.13-f2f", "model.layers.0.linear_attn.conv1d", (64, 1, 4)),
    "of several channels": ("qwen3_next-0.13-f2f", "model.layers.0.linear_attn.conv", (8, 3, 4)),
    "of patches of an image": ("qwen3_vl_moe-0.13-eager", "model.visual.patch_embed.proj", (32, 3, 4, 4)),
    "of patches of a video": ("qwen3_vl_moe-0.13-eager", "model.visual.patch_embed.proj", (32, 3, 2, 4, 4)),
}


def with_convolution(folder: Path, case: str, scale: tuple[int, ...] | None = None) -> tuple[Path, str]:
    """An export with a convolution in int8, with a scale for each output channel, or of another shape."""
    export, name, shape = CONVOLUTIONS[case]
    generator = torch.Generator().manual_seed(0)
    added = {
        f"{name}.weight": torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8),
        f"{name}.weight_scale": torch.rand(shape[:1] if scale is None else scale, generator=generator) * 0.01 + 1e-3,
    }
    folder.mkdir()
    (folder / "config.json").write_bytes((FAMILIES / export / "config.json").read_bytes())
    save_file(load_file(FAMILIES / export / "model.safetensors") | added, folder / "model.safetensors")
    return folder, name


@pytest.mark.parametrize("case", CONVOLUTIONS)
@pytest.mark.parametrize("to", TARGETS)
def test_conversion_dequantizes_a_convolution_with_one_rounding(case: str, to: str, tmp_path: Path) -> None:
    source, name = with_convolution(tmp_path / "source", case)
    inspection = quarkconv.inspect_checkpoint(source)
    errors = {item.code: item.subject for item in inspection.findings if item.severity.value == "error"}
    assert errors == {"float-module-quantized": name}
    assert not [fact for fact in inspection.engines if fact.form == "quark" and fact.verdict == "int8"]
    support: Any = inspection.targets[to]
    if not support.supported:
        assert to == "fused-int8"
        return
    out = quarkconv.convert_checkpoint(source, to, tmp_path / "out").output
    stored, written = load(source), load(out)
    scale = stored[f"{name}.weight_scale"].reshape(-1, *[1] * (stored[f"{name}.weight"].dim() - 1))
    expected = (stored[f"{name}.weight"].double() * scale.double()).float().bfloat16()
    assert torch.equal(written[f"{name}.weight"], expected)
    assert f"{name}.weight_scale" not in written
    assert quarkconv.verify_checkpoint(out, source, device="cpu", tokens=2).problems == ()


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_a_convolution_with_one_scale_is_read_as_well(case: str, tmp_path: Path) -> None:
    source, name = with_convolution(tmp_path / "source", case, ())
    out = quarkconv.convert_checkpoint(source, "bf16", tmp_path / "out").output
    stored = load(source)
    expected = (stored[f"{name}.weight"].double() * stored[f"{name}.weight_scale"].double()).float().bfloat16()
    assert torch.equal(load(out)[f"{name}.weight"], expected)


def test_the_plan_of_a_convolution_does_not_grow_with_its_channels(tmp_path: Path) -> None:
    source, name = with_convolution(tmp_path / "source", "of one channel each")
    plan = quarkconv.plan_conversion(source, "fused-int8")
    tensors = {tensor.name: tensor for shard in plan.shards for tensor in shard.tensors}
    assert len(tensors[f"{name}.weight"].pieces) == 1


def test_a_scale_of_0_of_a_convolution_is_found(tmp_path: Path) -> None:
    source, name = with_convolution(tmp_path / "source", "of patches of a video")
    tensors = load_file(source / "model.safetensors")
    tensors[f"{name}.weight_scale"][3] = 0
    save_file(tensors, source / "model.safetensors")
    problems = quarkconv.verify_checkpoint(source, device="cpu", tokens=2).problems
    assert [item.tensor for item in problems if "zero for rows" in item.message] == [f"{name}.weight_scale"]
    tensors[f"{name}.weight"][3] = 0
    save_file(tensors, source / "model.safetensors")
    problems = quarkconv.verify_checkpoint(source, device="cpu", tokens=2).problems
    assert not [item for item in problems if "zero for rows" in item.message]
