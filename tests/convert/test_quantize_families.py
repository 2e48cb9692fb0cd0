"""--quantize of families whose experts have other names, layouts and parts: codes of every linear, and verify."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import load
from support.exports import DATA, restore

import quarkconv

FAMILIES = {
    "dbrx-0.13-eager": "experts below experts.mlp, named w1, v1, w2",
    "deepseek_v4-0.13-f2f": "published names",
    "gemma4-0.13-f2f": "a router with scales",
    "gpt_oss-0.13-eager": "gate and up of an expert joined, biases",
    "granitemoehybrid-0.13-eager": "layers without experts",
    "nemotron_h-0.13-f2f": "experts without a gate",
    "qwen3_5_moe-0.13-f2f": "a language model below another",
}


def random_values(root: Path) -> Path:
    """The export with random values: the repository keeps some of them without."""
    generator = torch.Generator().manual_seed(1)
    for path in root.glob("*.safetensors"):
        tensors = load_file(path)
        for name, tensor in tensors.items():
            if tensor.dtype == torch.int8 and "zero_point" not in name:
                tensors[name] = torch.randint(-127, 128, tensor.shape, generator=generator, dtype=torch.int8)
            elif tensor.is_floating_point() and tensor.element_size() > 1:
                values = torch.rand(tensor.shape, generator=generator) / 100 + 0.001
                tensors[name] = values.to(tensor.dtype)
        save_file(tensors, path, metadata={"format": "pt"})
    return root


@pytest.mark.parametrize("family", FAMILIES)
def test_every_linear_has_the_codes_of_its_rows(tmp_path: Path, family: str) -> None:
    source = quarkconv.convert_checkpoint(
        random_values(restore(DATA / "families" / family, tmp_path / "int8")), "bf16", tmp_path / "source"
    ).output
    output = quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "out", quantize="all").output
    floats, found = load(source), load(output)
    quantized = [name for name, tensor in found.items() if tensor.dtype == torch.int8]
    assert any("experts" in name for name in quantized)
    for name in quantized:
        rows = floats[name]
        scale = (rows.abs().amax(-1) / 127.5).float()
        codes = (rows.float() * (1 / scale).unsqueeze(-1)).round().clamp(-128, 127).to(torch.int8)
        assert torch.equal(found[name], codes), name
        assert torch.equal(found[f"{name}_scale"].flatten(), scale), name
    assert all(torch.equal(found[name], tensor) for name, tensor in floats.items() if name not in quantized)
    assert quarkconv.verify_checkpoint(output, source, "cpu", tokens=1).ok
    assert not quarkconv.inspect_checkpoint(output).description.errors()
