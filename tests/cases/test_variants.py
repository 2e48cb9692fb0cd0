"""Variants of what users reported: declarations, transforms, names and stacks of layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
import torch
from support.model import Model, edited, experts, int8_linear
from support.reported import GATES, codes, finding, load, refusal

from quarkconv import UnsupportedError, convert_checkpoint, inspect_checkpoint, plan_conversion, verify_checkpoint
from quarkconv.targets import TARGETS

EXPERTS: Final = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(2))


def test_a_model_without_experts_is_not_sound(tmp_path: Path) -> None:
    model = Model()
    for prefix in EXPERTS:
        model.remove(prefix)
    model.config = {"model_type": "llama", "num_hidden_layers": 2, "quantization_config": model.quantization}
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert inspection.ok
    assert not inspection.headline.startswith("Sound")


def test_two_codes_in_an_element_are_unsupported_and_not_damaged(tmp_path: Path) -> None:
    source = edited(lambda name, t: {name: t[:, ::2].contiguous() if t.dtype == torch.int8 else t}).write(tmp_path)
    assert "two codes per element" in finding(source, "scheme-unsupported").message
    assert {refusal(source, target).exit_code for target in TARGETS} == {4}


@pytest.mark.parametrize("leaves", [("gate_up_proj", "down_proj"), ("gate_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.uint32])
def test_packed_experts_in_one_tensor_are_unsupported_and_not_damaged(
    dtype: torch.dtype, leaves: tuple[str, ...], tmp_path: Path
) -> None:
    """Two codes of int4 in each byte, or four of int8 in each word, as mlx-lm stores them (mlp.switch_mlp)."""
    model, codes_of = Model(), 4 if dtype is torch.uint32 else 2
    model.remove("model.layers.0.mlp.experts", "model.layers.1.mlp.experts")
    for layer in range(2):
        for leaf in leaves:
            rows, columns = {"gate_up_proj": (8, 8), "down_proj": (8, 4)}.get(leaf, (4, 8))
            fused = len(leaves) == 2
            module = f"model.layers.{layer}.mlp.{'experts' if fused else 'switch_mlp'}.{leaf}"
            weight, scale = (module, f"{module}_scale") if fused else (f"{module}.weight", f"{module}.weight_scale")
            model.set(weight, torch.zeros(3, rows, columns // codes_of, dtype=dtype))
            model.set(scale, torch.ones(3, rows))
    source = model.write(tmp_path)
    assert "expert-shape" not in codes(source)
    assert {refusal(source, target).exit_code for target in TARGETS} == {4}


def in_switch_mlp() -> Model:
    """The experts of each layer in tensors of ``mlp.switch_mlp``, as mlx-lm names them; the router is ``mlp.gate``."""
    model = Model()
    for layer, shard in enumerate(model.shards):
        mlp = f"model.layers.{layer}.mlp"
        for leaf in ("gate_proj", "up_proj", "down_proj"):
            for end in ("weight", "weight_scale"):
                parts = [shard.pop(f"{mlp}.experts.{expert}.{leaf}.{end}") for expert in range(3)]
                shard[f"{mlp}.switch_mlp.{leaf}.{end}"] = torch.stack(parts)
    return model


def test_the_router_of_experts_in_switch_mlp_is_beside_it(tmp_path: Path) -> None:
    source = in_switch_mlp().write(tmp_path / "source")
    assert codes(source) == {}
    out = convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    for checkpoint in (source, out):
        verification = verify_checkpoint(checkpoint, device="cpu", tokens=2)
        assert verification.ok
        assert {layer.routing.partition(":")[0] for layer in verification.numbers.layers} == {"the model's own"}
    assert {row.verdict for row in inspect_checkpoint(source).engines} <= {"not checked", "fails", "wrong"}


def test_a_missing_router_beside_switch_mlp_is_named(tmp_path: Path) -> None:
    model = in_switch_mlp()
    model.remove("model.layers.1.mlp.gate.")
    assert finding(model.write(tmp_path), "router-mismatch").subject == "model.layers.1.mlp.gate.weight"


def test_a_packed_format_over_plain_int8_weights_is_an_error(tmp_path: Path) -> None:
    """Engines look for weight_packed; the tensors are those of int-quantized."""
    source = convert_checkpoint(Model().write(tmp_path / "plain"), "compressed-tensors", tmp_path / "source").output
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["format"] = "pack-quantized"
    (source / "config.json").write_text(json.dumps(config))
    (source / "quarkconv.json").unlink()
    assert codes(source) == {"dtype-mismatch": "error"}
    assert inspect_checkpoint(convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output, deep=True).ok


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "fbgemm_fp8"])
def test_an_unknown_method_over_int8_weights_is_named(method: str, tmp_path: Path) -> None:
    model = Model()
    model.quantization["quant_method"] = method
    source = model.write(tmp_path / "source")
    assert (
        f"20 int8 modules under the unsupported quant_method {method}" in finding(source, "scheme-unsupported").message
    )
    assert refusal(source, "fused-int8").exit_code == 4
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out", scheme="ptpc_int8").output
    assert verify_checkpoint(out, source, device="cpu").ok


def test_int8_that_the_config_declares_in_another_dtype_is_an_error(tmp_path: Path) -> None:
    model = Model()
    model.quantization["global_quant_config"]["weight"]["dtype"] = "int4"
    source = model.write(tmp_path / "source")
    assert codes(source) == {"dtype-mismatch": "error"}
    out = convert_checkpoint(source, "quark", tmp_path / "out").output
    assert verify_checkpoint(out, device="cpu").ok


@pytest.mark.parametrize("activations", [None, "asymmetric"])
def test_what_is_not_w8a8_is_not_verified_as_if_it_were(activations: str | None, tmp_path: Path) -> None:
    model = Model()
    if activations is None:
        model.quantization["global_quant_config"]["input_tensors"] = None
    else:
        model.quantization["global_quant_config"]["input_tensors"]["symmetric"] = False
    source = model.write(tmp_path)
    with pytest.raises(UnsupportedError, match="scheme-unsupported"):
        verify_checkpoint(source, device="cpu")
    assert refusal(source, "quark").exit_code == 4


# Transforms at run time

TRANSFORM: Final = {
    "type": "hadamard",
    "apply": [{"targets": ["re:.*down_proj$"], "location": "input", "inverse": False, "ignore": []}],
}


@pytest.mark.parametrize(("location", "is_online"), [("input", True), ("weight_input", False)])
def test_transforms_of_experts_at_run_time_are_an_error(location: str, is_online: bool, tmp_path: Path) -> None:
    start = convert_checkpoint(Model().write(tmp_path / "quark"), "compressed-tensors", tmp_path / "source").output
    config = json.loads((start / "config.json").read_text())
    apply = [{**TRANSFORM["apply"][0], "location": location}]  # type: ignore[dict-item]
    config["quantization_config"]["transform_config"] = {"config_groups": {"R4": {**TRANSFORM, "apply": apply}}}
    (start / "config.json").write_text(json.dumps(config))
    assert ("rotation-online" in codes(start)) is is_online
    if is_online:
        assert refusal(start, "compressed-tensors").exit_code == 4


# Names, numbers and stacks of layers


@pytest.mark.parametrize("pattern", ["mlp.expert_list.{}", "mlp.local_experts.{}", "mlp.experts.expert_{}"])
@pytest.mark.parametrize("claimed", [True, False])
def test_experts_under_names_that_nobody_knows_are_named(pattern: str, claimed: bool, tmp_path: Path) -> None:
    def rename(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        head, inside, tail = name.partition("mlp.experts.")
        number, _, leaf = tail.partition(".")
        return {f"{head}{pattern.format(number)}.{leaf}" if inside else name: tensor}

    model = edited(rename)
    if not claimed:
        del model.config["num_experts"]
    source = model.write(tmp_path)
    found = finding(source, "experts-not-understood")
    assert pattern.format(0) in found.message
    assert "not-moe" not in codes(source)
    assert refusal(source, "fused-int8").exit_code == 4


def test_numbers_that_no_tool_writes_are_still_those_of_experts(tmp_path: Path) -> None:
    source = edited(lambda name, t: {name.replace(".experts.", ".experts.0"): t}).write(tmp_path / "source")
    assert "experts.00." in finding(source, "experts-not-understood").message
    assert "not-moe" not in codes(source)
    out = convert_checkpoint(source, "quark", tmp_path / "out").output
    assert verify_checkpoint(out, source, device="cpu").ok


def test_tensors_of_unknown_meaning_are_not_called_sound(tmp_path: Path) -> None:
    model = Model()
    model.first["model.layers.0.input_layernorm.weight"] = torch.ones(8, dtype=torch.int8)
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert "tensors of unknown meaning" in inspection.not_checked
    assert not inspection.headline.startswith("Sound")


@pytest.mark.parametrize("stack", ["vision_tower", "model.visual", "model.encoder"])
def test_experts_beside_the_language_model_are_not_judged_by_its_config(stack: str, tmp_path: Path) -> None:
    model = Model()
    model.second |= experts(f"{stack}.layers.0.mlp.experts", range(2), hidden=8, intermediate=6)
    source = model.write(tmp_path / "source")
    assert "expert-count" not in codes(source)
    inspection = inspect_checkpoint(source, deep=True)
    name = stack.rpartition(".")[2]
    assert f"config.json does not describe the layers of {name}" in str(inspection.not_checked)
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    assert verify_checkpoint(out, source, device="cpu", layers=[*EXPERTS]).numbers.skipped is None


def test_experts_beside_the_language_model_are_compared_with_their_own_config(tmp_path: Path) -> None:
    model = Model()
    model.second |= experts("vision_tower.layers.0.mlp.experts", range(2), hidden=8, intermediate=6)
    model.config["vision_config"] = {"num_experts": 4}
    assert finding(model.write(tmp_path), "expert-count").subject == "vision_tower.layers.0.mlp.experts"


@pytest.mark.parametrize("counted_in", [True, False])
def test_a_layer_of_prediction_is_known_by_its_modules(counted_in: bool, tmp_path: Path) -> None:
    model = Model()
    model.config |= {"num_nextn_predict_layers": 1, "num_hidden_layers": 3 if counted_in else 2}
    model.second |= experts("model.layers.2.mlp.experts", range(3))
    model.second |= int8_linear("model.layers.2.eh_proj", 8, 16)
    source = model.write(tmp_path / "source")
    assert "mtp-missing" not in [item.code for item in inspect_checkpoint(source).findings]
    result = convert_checkpoint(source, "fused-int8", tmp_path / "out", mtp="drop")
    out = result.output
    assert "config-mismatch" not in {item.code for item in result.plan.losses}
    assert "config-mismatch" not in {item.code for item in inspect_checkpoint(out).findings}
    assert not [name for name in load(out) if ".layers.2." in name]
    config = json.loads((out / "config.json").read_text())
    assert (config["num_hidden_layers"], config["num_nextn_predict_layers"]) == (2, 0)


def test_int8_embeddings_are_dequantized(tmp_path: Path) -> None:
    model = Model()
    model.first |= int8_linear("model.embed_tokens", 16, 8)
    source = model.write(tmp_path / "source")
    assert finding(source, "float-module-quantized").subject == "model.embed_tokens"
    for target in TARGETS:
        out = convert_checkpoint(source, target, tmp_path / target).output
        assert load(out)["model.embed_tokens.weight"].dtype == torch.bfloat16
        assert inspect_checkpoint(out).ok or target == "bf16"


@pytest.mark.parametrize("part", ["language_model_config", "text_config", "llm_config"])
def test_a_quantization_config_is_found_in_any_part(part: str, tmp_path: Path) -> None:
    model = Model()
    model.config = {"model_type": "wrapper", part: model.config}
    source = model.write(tmp_path / "source")
    assert "scheme-implied" not in codes(source)
    out = convert_checkpoint(source, "w8a8-int8", tmp_path / "out").output
    config = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in config[part]
    assert config["quantization_config"]["quant_method"] == "w8a8_int8"
    assert set(GATES) <= set(config["quantization_config"]["ignore"])
    assert plan_conversion(out, "quark").tensor_bytes > 0
