"""vLLM's own lookup in the config that is written for attention in FP8 beside experts in INT8."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
import torch
from support.reported import FP8_BLOCKS, PREDICTION, with_fp8_attention, with_fp8_blocks
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsConfig

import quarkconv

MERGED: Final = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}


class QKVParallelLinear(torch.nn.Module):
    """Stands for vLLM's class: its name contains Linear."""


class RoutedExperts(torch.nn.Module):
    """Stands for vLLM's class."""


@pytest.mark.parametrize("target", ["compressed-tensors", "fused-int8"])
@pytest.mark.parametrize("per_channel", [False, True])
def test_each_layer_gets_the_scheme_of_its_modules(target: str, per_channel: bool, tmp_path: Path) -> None:
    source = with_fp8_attention(per_channel=per_channel).write(tmp_path / "source")
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out").output
    config = CompressedTensorsConfig.from_config(json.loads((out / "config.json").read_text())["quantization_config"])
    config.packed_modules_mapping = MERGED
    config._add_fused_moe_to_target_scheme_map()
    linear, experts = QKVParallelLinear(), RoutedExperts()
    for leaf in ("qkv_proj", "o_proj"):
        found = config.get_scheme_dict(linear, f"model.layers.0.self_attn.{leaf}")
        assert found is not None
        assert config._is_fp8_w8a8(found["weights"], found["input_activations"])
        assert found["format"] == "float-quantized"
    for leaf in ("gate_proj", "up_proj", "down_proj"):
        found = config.get_scheme_dict(experts, f"model.layers.0.mlp.experts.0.{leaf}")
        assert found is not None
        assert config._is_dynamic_token_w8a8(found["weights"], found["input_activations"])
        assert found["weights"].type == "int"
    assert config.get_scheme_dict(linear, "model.layers.1.self_attn.o_proj") is None


@pytest.mark.parametrize("target", ["compressed-tensors", "fused-int8"])
def test_blocks_of_attention_and_of_experts_get_their_scheme(target: str, tmp_path: Path) -> None:
    source = with_fp8_blocks(prediction=True).write(tmp_path / "source")
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out").output
    config = CompressedTensorsConfig.from_config(json.loads((out / "config.json").read_text())["quantization_config"])
    config.packed_modules_mapping = MERGED
    config._add_fused_moe_to_target_scheme_map()
    linear, experts = QKVParallelLinear(), RoutedExperts()
    names: list[tuple[torch.nn.Module, str]] = [(linear, FP8_BLOCKS)]
    names += [(experts, f"{PREDICTION}.0.{leaf}") for leaf in ("gate_proj", "up_proj", "down_proj")]
    for layer, name in names:
        found = config.get_scheme_dict(layer, name)
        assert found is not None
        assert config._is_fp8_w8a8(found["weights"], found["input_activations"])
        assert found["weights"].block_structure == [128, 128]
    found = config.get_scheme_dict(experts, "model.layers.0.mlp.experts.0.gate_proj")
    assert found is not None
    assert found["weights"].type == "int"
