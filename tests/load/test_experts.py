"""Loading fused experts from every layout, against tensors read one by one."""

from __future__ import annotations

import pytest
import torch
from support.checkpoints import load
from support.exports import Checkpoints, Converted

import quarkconv
from quarkconv.kernels import fused_experts_int8


@pytest.mark.parametrize(
    ("name", "layer", "prefix", "names"),
    [
        ("qwen3_moe-quark0.13-f2f", 2, "model.layers.2.mlp.experts", ("gate_proj", "up_proj", "down_proj")),
        ("mixtral-quark0.11-eager", 0, "model.layers.0.block_sparse_moe.experts", ("w1", "w3", "w2")),
    ],
)
def test_per_expert_and_fused_load_alike(
    name: str, layer: int, prefix: str, names: tuple[str, str, str], checkpoints: Checkpoints, converted: Converted
) -> None:
    stored = load(checkpoints(name))
    gate, up, down = names
    for model in (checkpoints(name), converted(name)):
        experts = quarkconv.load_fused_experts(model, layer)
        for expert in range(experts.experts):
            base = f"{prefix}.{expert}"
            assert torch.equal(
                experts.w13[expert], torch.cat([stored[f"{base}.{gate}.weight"], stored[f"{base}.{up}.weight"]])
            )
            assert torch.equal(experts.w2[expert], stored[f"{base}.{down}.weight"])
            scales = torch.cat([stored[f"{base}.{gate}.weight_scale"], stored[f"{base}.{up}.weight_scale"]]).float()
            assert torch.equal(experts.w13_scale[expert, :, 0], scales)
            assert torch.equal(experts.w2_scale[expert, :, 0], stored[f"{base}.{down}.weight_scale"].float())
        assert experts.w13_input_scale is None


def test_the_stacked_layout_is_loaded(checkpoints: Checkpoints, converted: Converted) -> None:
    stored = load(checkpoints("step3p5-like-3key_fused"))
    for model in (checkpoints("step3p5-like-3key_fused"), converted("step3p5-like-3key_fused")):
        experts = quarkconv.load_fused_experts(model, 1)
        names = [f"model.layers.1.moe.{name}" for name in ("gate_proj", "up_proj", "down_proj")]
        assert torch.equal(experts.w13, torch.cat([stored[f"{name}.weight"] for name in names[:2]], 1))
        assert torch.equal(experts.w2_scale[..., 0], stored[f"{names[2]}.weight_scale"])


def test_static_scales_are_loaded(checkpoints: Checkpoints, converted: Converted) -> None:
    name = "qwen3_moe-quark0.11-eager-int8_static"
    stored = load(checkpoints(name))
    for model in (checkpoints(name), converted(name)):
        experts = quarkconv.load_fused_experts(model, 0)
        expected = [stored[f"model.layers.0.mlp.experts.{n}.down_proj.input_scale"] for n in range(8)]
        assert experts.w2_input_scale is not None
        assert experts.w2_input_scale.tolist() == torch.stack(expected).tolist()
        assert (experts.w13_scale[3, :96] == stored["model.layers.0.mlp.experts.3.gate_proj.weight_scale"]).all()


def test_a_loaded_layer_runs(checkpoints: Checkpoints) -> None:
    experts = quarkconv.load_fused_experts(checkpoints("qwen3_moe-quark0.13-f2f"), 0)
    states = torch.randn(4, experts.hidden_size, dtype=torch.bfloat16)
    ids = torch.tensor([[0, 1], [2, 3], [4, 5], [6, 7]])
    output = fused_experts_int8(
        states, experts.w13, experts.w2, experts.w13_scale, experts.w2_scale, torch.full((4, 2), 0.5), ids
    )
    assert output.shape == states.shape
    assert output.isfinite().all()


def test_a_layer_that_does_not_exist_is_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(quarkconv.UsageError, match="No such MoE layer"):
        quarkconv.load_fused_experts(checkpoints("deepseek_v3-quark0.13-f2f"), 0)


def test_float_experts_are_refused(checkpoints: Checkpoints) -> None:
    with pytest.raises(quarkconv.UnsupportedError):
        quarkconv.load_fused_experts(checkpoints("qwen3_moe-bf16"), 0)
