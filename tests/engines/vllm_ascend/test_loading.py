"""The target ``ascend`` in vllm-ascend's own config and loader: parameters are what stacking the Quark export gives.

vllm-ascend 0.23.0 belongs to vLLM 0.23.0. Nothing runs on an NPU.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from engines.expected import WHOLE, Stacked, fill
from engines.vllm_ascend.loading import load
from support.exports import Checkpoints

import quarkconv

EXPORTS = (
    "qwen3_moe-quark0.13-f2f",
    "qwen3_moe-0.13-f2f-layer_excluded",
    "minimax_m2-quark0.13-f2f",
    "glm4_moe-0.13-f2f-experts_only",
    "glm4_moe-0.13-f2f-mtp_bf16",
)
FAILS = {
    "mixtral-quark0.11-eager": (KeyError, "block_sparse_moe.experts.weight"),
    "qwen2_moe-0.13-f2f-shared_expert": (KeyError, "mlp.experts.weight"),
    "deepseek_v3-quark0.13-f2f": (NotImplementedError, "MLA is not supported on CPU"),
}
"""What does not load, and how: model types that vllm-ascend has no row for in ``packed_modules_model_mapping``; latent
attention, which vLLM builds on devices only."""
PUBLISHED = {"minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True}}
"""Model type -> fields that the published models have in config.json, vLLM reads, and the fixtures lack."""
DESCRIPTION = "quant_model_description.json"

Converted = Callable[[str], tuple[Path, Path]]


@pytest.fixture(scope="module")
def converted(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Name of an export -> a copy of it with content, and its conversion to ascend."""

    def convert(name: str) -> tuple[Path, Path]:
        folder = tmp_path_factory.mktemp("ascend")
        source = fill(checkpoints.copy(name, folder / "source"))
        path = source / "config.json"
        config = json.loads(path.read_text())
        path.write_text(json.dumps(config | PUBLISHED.get(config["model_type"], {})))
        return source, quarkconv.convert_checkpoint(source, "ascend", folder / "out", jobs=1).output

    return convert


@pytest.mark.parametrize("name", EXPORTS)
def test_every_parameter_is_what_stacking_gives(converted: Converted, name: str) -> None:
    """Scales are parameters of the model's dtype there: vllm-ascend rounds them to BF16."""
    source, output = converted(name)
    stacked, model = Stacked(source), load(output)
    seen = set()
    for key, parameter in model.named_parameters():
        if key.endswith("weight_offset"):
            expected = torch.zeros_like(parameter)
        else:
            expected = stacked.parameter(key, WHOLE)
            expected = expected.to(parameter.dtype) if expected.is_floating_point() else expected
        assert expected.dtype == parameter.dtype, key
        assert torch.equal(expected, parameter.data), key
        seen.add(key.rpartition(".")[2])
    assert {"w13_weight", "w13_weight_scale", "w13_weight_offset", "w2_weight", "w2_weight_scale"} <= seen


@pytest.mark.parametrize("name", FAILS)
def test_what_vllm_ascend_refuses(converted: Converted, name: str) -> None:
    error, message = FAILS[name]
    with pytest.raises(error, match=message):
        load(converted(name)[1])


def _edit(folder: Path, change: Callable[[dict[str, str]], object]) -> None:
    path = folder / DESCRIPTION
    description = json.loads(path.read_text())
    change(description)
    path.write_text(json.dumps(description))


UP = "model.layers.0.mlp.experts.0.up_proj.weight"
Q = "model.layers.0.self_attn.q_proj.weight"
DEFECTS: dict[str, tuple[Callable[[dict[str, str]], object], type[Exception], str]] = {
    "an entry is missing": (lambda entries: entries.pop(UP), KeyError, UP),
    "merged linears differ in type": (lambda entries: entries.update({Q: "FLOAT"}), ValueError, "qkv_proj"),
}


@pytest.mark.parametrize("defect", DEFECTS)
def test_inspect_finds_what_vllm_ascend_refuses(converted: Converted, defect: str) -> None:
    change, error, message = DEFECTS[defect]
    _, output = converted("qwen3_moe-quark0.13-f2f")
    _edit(output, change)
    with pytest.raises(error, match=message):
        load(output)
    assert "description-mismatch" in {item.code for item in quarkconv.inspect_checkpoint(output).findings}
