"""What a source's config says beside weights and activations: carried over, or named as lost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import load, make_checkpoint
from support.exports import Checkpoints
from support.program import run_cli

import quarkconv
from quarkconv.findings import Finding, Severity
from quarkconv.plan.plan import Plan

KV_CACHE = "qwen3_moe-0.11-eager-kv_cache_fp8"
FP8 = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}


def quantization(root: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((root / "config.json").read_text())["quantization_config"]
    return value


def with_settings(folder: Path, change: dict[str, Any]) -> Path:
    """A Quark export whose quantization_config says more."""
    root = make_checkpoint(folder)
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"].update(change)
    (root / "config.json").write_text(json.dumps(config))
    return root


def losses(root: Path, target: str) -> list[Finding]:
    return list(quarkconv.plan_conversion(root, target).losses)


def test_the_stored_form_alone_loses_nothing(checkpoints: Checkpoints) -> None:
    for name in ("qwen3_moe-quark0.13-f2f", "mixtral-quark0.11-eager", "minimax_m2-quark0.13-f2f"):
        for target in ("fused-int8", "compressed-tensors", "w8a8-int8", "bf16", "quark"):
            assert losses(checkpoints(name), target) == []


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors"])
def test_an_fp8_key_value_cache_goes_over_to_compressed_tensors(
    checkpoints: Checkpoints, tmp_path: Path, target: str
) -> None:
    out = quarkconv.convert_checkpoint(checkpoints(KV_CACHE), target, tmp_path / "out").output
    assert quantization(out)["kv_cache_scheme"] == FP8
    assert losses(checkpoints(KV_CACHE), target) == []
    before, after = load(checkpoints(KV_CACHE)), load(out)
    for part in "kv":
        scale = after[f"model.layers.0.self_attn.{part}_scale"]
        assert torch.equal(scale, before[f"model.layers.0.self_attn.{part}_proj.output_scale"])
    assert not [name for name in after if name.endswith("output_scale")]
    assert quarkconv.inspect_checkpoint(out).findings == ()


def test_an_fp8_key_value_cache_comes_back_to_quark(checkpoints: Checkpoints, tmp_path: Path) -> None:
    there = quarkconv.convert_checkpoint(checkpoints(KV_CACHE), "fused-int8", tmp_path / "there").output
    back = quarkconv.convert_checkpoint(there, "quark", tmp_path / "back")
    before, after = quantization(checkpoints(KV_CACHE)), quantization(back.output)
    assert back.plan.losses == ()
    names = {name for name in load(checkpoints(KV_CACHE)) if name.endswith("output_scale")}
    assert names == {name for name in load(back.output) if name.endswith("output_scale")}
    assert len(names) == 4
    assert after["export"]["kv_cache_group"] == before["export"]["kv_cache_group"] == ["*k_proj", "*v_proj"]
    for field in ("layer_quant_config", "kv_cache_quant_config"):
        assert after[field].keys() == before[field].keys()
        for pattern, layer in before[field].items():
            for tensor in ("weight", "input_tensors", "output_tensors"):
                for key in ("dtype", "qscheme", "is_dynamic", "symmetric", "ch_axis"):
                    assert after[field][pattern][tensor][key] == layer[tensor][key]


@pytest.mark.parametrize("target", ["w8a8-int8", "bf16"])
def test_a_key_value_cache_that_a_target_cannot_express_is_reported(checkpoints: Checkpoints, target: str) -> None:
    found = {item.code: item for item in losses(checkpoints(KV_CACHE), target)}
    assert found["setting-dropped"].subject == "quantization_config.kv_cache"
    assert found["setting-dropped"].severity is Severity.WARNING
    assert "fp8_e4m3" in found["setting-dropped"].message
    assert "tensor-dropped" in found


def test_dropped_tensors_are_counted(checkpoints: Checkpoints) -> None:
    (found,) = losses(checkpoints("qwen3_moe-quark0.11-eager-int8_static"), "bf16")
    stored = [
        name
        for name in load(checkpoints("qwen3_moe-quark0.11-eager-int8_static"))
        if name.endswith(("input_scale", "input_zero_point"))
    ]
    assert (found.code, found.count, found.subject) == ("tensor-dropped", len(stored), found.subject)
    assert found.subject in stored


@pytest.mark.parametrize(
    ("change", "subject"),
    [
        ({"algo_config": {"name": "rotation"}}, "algo_config"),
        ({"softmax_quant_spec": {"dtype": "fp8_e4m3"}}, "softmax_quant_spec"),
        ({"kv_cache_post_rope": True}, "kv_cache_post_rope"),
        ({"something_new": 3}, "something_new"),
        ({"export": {"weight_format": "real_quantized", "rotation": "R1"}}, "export.rotation"),
        ({"layer_quant_config": {"*o_proj": {"bias": {"dtype": "int8"}}}}, "layer_quant_config.*o_proj.bias"),
        (
            {"layer_quant_config": {"lm_head": {"output_tensors": {"dtype": "int8", "qscheme": "per_tensor"}}}},
            "layer_quant_config.lm_head.output_tensors",
        ),
    ],
)
def test_every_other_setting_is_named(tmp_path: Path, change: dict[str, Any], subject: str) -> None:
    root = with_settings(tmp_path / "model", change)
    for target in ("fused-int8", "compressed-tensors", "w8a8-int8", "bf16"):
        found = losses(root, target)
        assert [(item.code, item.subject) for item in found] == [("setting-dropped", f"quantization_config.{subject}")]


def test_quark_keeps_the_settings_of_quark(tmp_path: Path) -> None:
    root = with_settings(tmp_path / "model", {"algo_config": {"name": "rotation"}, "kv_cache_post_rope": True})
    result = quarkconv.convert_checkpoint(root, "quark", tmp_path / "out")
    assert result.plan.losses == ()
    assert quantization(result.output)["algo_config"] == {"name": "rotation"}
    assert quantization(result.output)["kv_cache_post_rope"] is True


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors"])
def test_compressed_tensors_keeps_its_settings(tmp_path: Path, target: str) -> None:
    there = quarkconv.convert_checkpoint(make_checkpoint(tmp_path / "model"), "fused-int8", tmp_path / "there").output
    config = json.loads((there / "config.json").read_text())
    more = {
        "transform_config": {"config_groups": {"R1": {}}},
        "kv_cache_scheme": {**FP8, "strategy": "attn_head", "dynamic": True},
    }
    config["quantization_config"].update(more)
    (there / "config.json").write_text(json.dumps(config))
    result = quarkconv.convert_checkpoint(there, target, tmp_path / "out")
    assert result.plan.losses == ()
    assert more.items() <= quantization(result.output).items()
    for other in ("quark", "w8a8-int8", "bf16"):
        with pytest.raises(quarkconv.UnsupportedError, match="transform_config"):
            quarkconv.plan_conversion(there, other)


def test_losses_are_shown_and_survive_json(
    checkpoints: Checkpoints, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = quarkconv.plan_conversion(checkpoints(KV_CACHE), "bf16")
    assert Plan.from_json(json.loads(json.dumps(plan.to_json()))) == plan
    args = ("convert", checkpoints(KV_CACHE), "--to", "bf16", "--out", tmp_path / "out")
    code, out, _ = run_cli(capsys, *args, "--dry-run", "--json")
    assert code == 0
    findings = json.loads(out)["findings"]
    assert [item["code"] for item in findings] == ["setting-dropped", "tensor-dropped"]
    code, out, _ = run_cli(capsys, *args)
    assert code == 0
    assert "quantization_config.kv_cache" in out
    code, out, _ = run_cli(capsys, "inspect", checkpoints(KV_CACHE), "--json")
    targets = json.loads(out)["targets"]
    assert "findings" not in targets["fused-int8"]
    assert [item["code"] for item in targets["bf16"]["findings"]] == ["setting-dropped", "tensor-dropped"]
