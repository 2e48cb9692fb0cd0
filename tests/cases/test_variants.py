"""Variants of what users reported: settings, companions and layouts that change the function or are unsupported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support.model import Model, experts, int8_linear
from support.reported import GATES, bare, codes, finding, load, losses, refusal

from quarkconv import (
    QuarkconvError,
    UnsupportedError,
    convert_checkpoint,
    inspect_checkpoint,
    plan_conversion,
    verify_checkpoint,
)
from quarkconv.targets import TARGETS

EXPERTS: Final = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(2))
DOWN: Final = f"{EXPERTS[0]}.0.down_proj"


def with_settings(**settings: Any) -> Model:
    model = Model()
    model.config |= settings
    return model


def edited(edit: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Model:
    """A model with each tensor replaced by others."""
    model = Model()
    for shard in model.shards:
        for name in list(shard):
            shard |= edit(name, shard.pop(name))
    return model


def with_scales(change: Callable[[torch.Tensor, int], torch.Tensor]) -> Model:
    """A model whose scales are changed, by the number of their weight's columns."""
    model = Model()
    for shard in model.shards:
        for name in [name for name in shard if name.endswith("weight_scale")]:
            shard[name] = change(shard[name], shard[name.removesuffix("_scale")].shape[1]).contiguous()
    return model


def with_biases(*, of: tuple[str, ...] = ("gate_proj", "up_proj", "down_proj")) -> Model:
    def add(name: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        module = name.removesuffix(".weight")
        has = module != name and ".experts." in name and module.endswith(of)
        return {name: tensor} | ({f"{module}.bias": torch.rand(len(tensor))} if has else {})

    return edited(add)


# Knowledge of the model type is not enough: settings and tensors may say otherwise


def with_tensors(**tensors: torch.Tensor) -> Model:
    """A model with more tensors of its first expert."""
    model = Model()
    model.first |= {f"{EXPERTS[0]}.0.{name.replace('__', '.')}": tensor for name, tensor in tensors.items()}
    return model


UNKNOWN: Final[dict[str, Callable[[], Model]]] = {
    "an activation that models of the type do not have": lambda: with_settings(hidden_act="mish"),
    "a limit for each layer": lambda: with_settings(swiglu_limit=[7.0, 7.0]),
    "a slope": lambda: with_settings(moe_activation_alpha=1.702),
    "an activation under another key": lambda: with_settings(activation_function="gelu"),
    "a factor on the experts": lambda: with_settings(expert_output_multiplier=0.5),
    "layer 0 routed by token id": lambda: with_settings(hash_moe_layers=[0]),
    "a latent width": lambda: with_settings(moe_latent_size=4),
    "weights on the input": lambda: with_settings(apply_router_weight_on_input=True),
    "a scale on the weights": lambda: with_settings(routed_scaling_factor=2.5),
    "groups of experts": lambda: with_settings(n_group=3),
    "biases": with_biases,
    "a projection beside the others": lambda: with_tensors(
        extra_proj__weight=torch.ones(8, 8, dtype=torch.int8), extra_proj__weight_scale=torch.ones(8)
    ),
    "a norm of an expert": lambda: with_tensors(norm__weight=torch.ones(4)),
    "a factor of an expert": lambda: with_tensors(alpha=torch.ones(4)),
}


@pytest.mark.parametrize("variant", ["a projection beside the others", "a norm of an expert", "a factor of an expert"])
def test_experts_with_tensors_of_unknown_meaning_are_not_fused(variant: str, tmp_path: Path) -> None:
    error = refusal(UNKNOWN[variant]().write(tmp_path), "fused-int8")
    assert (error.exit_code, "its meaning is not known" in str(error)) == (4, True)


@pytest.mark.parametrize("variant", UNKNOWN)
def test_what_is_not_known_is_neither_sound_nor_proven(variant: str, tmp_path: Path) -> None:
    source = UNKNOWN[variant]().write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert inspection.ok
    assert not inspection.headline.startswith("Sound")
    assert "the function of the experts" in str(inspection.not_checked)
    result = verify_checkpoint(source, device="cpu")
    assert result.ok
    assert result.numbers.layers == ()
    assert "the function of the experts is unknown" in str(result.numbers.skipped)
    out = convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    assert verify_checkpoint(out, source, device="cpu").verdict().endswith("not checked: numbers")


@pytest.mark.parametrize(
    "settings", [{"norm_topk_prob": "yes"}, {"num_experts_per_tok": 9}, {"num_experts_per_tok": [2, 1]}]
)
def test_a_routing_that_is_not_known_is_not_sound(settings: dict[str, Any], tmp_path: Path) -> None:
    inspection = inspect_checkpoint(with_settings(**settings).write(tmp_path), deep=True)
    assert not inspection.headline.startswith("Sound")
    assert "the routing (config.json says" in str(inspection.not_checked)


@pytest.mark.parametrize("settings", [{"expert_output_multiplier": 1.0}, {"activation_function": "silu"}])
def test_values_that_change_nothing_leave_a_model_known(settings: dict[str, Any], tmp_path: Path) -> None:
    assert inspect_checkpoint(with_settings(**settings).write(tmp_path), deep=True).not_checked == ()


def test_experts_with_a_gate_that_their_activation_lacks_are_not_computed(tmp_path: Path) -> None:
    model = with_settings(model_type="nemotron_h", mlp_hidden_act="relu2", norm_topk_prob=True, n_group=1, topk_group=1)
    model.config["routed_scaling_factor"] = 1.0
    del model.config["hidden_act"]
    result = verify_checkpoint(model.write(tmp_path), device="cpu")
    assert "the experts have a gate, and those of the model type nemotron_h do not" in str(result.numbers.skipped)


def test_a_model_without_experts_is_not_sound(tmp_path: Path) -> None:
    model = Model()
    for prefix in EXPERTS:
        model.remove(prefix)
    model.config = {"model_type": "llama", "num_hidden_layers": 2, "quantization_config": model.quantization}
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert inspection.ok
    assert not inspection.headline.startswith("Sound")


# One tensor for all experts, quantized: the order of its rows is the model type's


def fused_gpt_oss(*, biases: bool) -> Model:
    model = bare()
    model.config |= {"model_type": "gpt_oss", "num_local_experts": 3, "swiglu_limit": 7.0}
    for prefix, shard in zip(EXPERTS, model.shards, strict=True):
        model.remove(prefix)
        for leaf, rows, columns in (("gate_up_proj", 8, 8), ("down_proj", 8, 4)):
            shard[f"{prefix}.{leaf}"] = torch.randint(-127, 127, (3, rows, columns), dtype=torch.int8)
            shard[f"{prefix}.{leaf}_scale"] = torch.rand(3, rows, 1) + 0.1
            if biases:
                shard[f"{prefix}.{leaf}_bias"] = torch.rand(3, rows)
    return model


@pytest.mark.parametrize("biases", [True, False])
def test_int8_rows_of_gate_and_up_that_alternate_are_not_taken_for_halves(biases: bool, tmp_path: Path) -> None:
    source = fused_gpt_oss(biases=biases).write(tmp_path)
    found = finding(source, "experts-not-understood")
    assert "alternating rows of gate and up" in found.message
    assert ("biases" in found.message) is biases
    for target in TARGETS:
        assert refusal(source, target).exit_code == 4
    with pytest.raises(UnsupportedError):
        verify_checkpoint(source, device="cpu")


@pytest.mark.parametrize("of", [("down_proj",), ("0.gate_proj", "0.up_proj", "0.down_proj"), ("1.up_proj",)])
def test_a_bias_of_some_projections_is_unsupported(of: tuple[str, ...], tmp_path: Path) -> None:
    source = with_biases(of=of).write(tmp_path)
    assert "experts-not-understood" in codes(source)
    assert refusal(source, "fused-int8").exit_code == 4


def test_a_bias_of_another_size_is_damage(tmp_path: Path) -> None:
    model = with_biases()
    bias = f"{EXPERTS[0]}.1.up_proj.bias"
    model.set(bias, torch.rand(5))
    source = model.write(tmp_path)
    assert finding(source, "expert-shape").subject == bias
    assert refusal(source, "bf16").exit_code == 3


def test_two_codes_in_an_element_are_unsupported_and_not_damaged(tmp_path: Path) -> None:
    source = edited(lambda name, t: {name: t[:, ::2].contiguous() if t.dtype == torch.int8 else t}).write(tmp_path)
    assert "two codes in each element" in finding(source, "scheme-unsupported").message
    assert {refusal(source, target).exit_code for target in TARGETS} == {4}


def test_a_packed_format_over_plain_int8_weights_is_an_error(tmp_path: Path) -> None:
    """Engines look for weight_packed; the tensors are those of int-quantized."""
    source = convert_checkpoint(Model().write(tmp_path / "plain"), "compressed-tensors", tmp_path / "source").output
    config = json.loads((source / "config.json").read_text())
    config["quantization_config"]["format"] = "pack-quantized"
    (source / "config.json").write_text(json.dumps(config))
    (source / "quarkconv.json").unlink()
    assert codes(source) == {"dtype-mismatch": "error"}
    assert inspect_checkpoint(convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output, deep=True).ok


@pytest.mark.parametrize("target", TARGETS)
def test_negative_scales_stay_sound_in_every_target(target: str, tmp_path: Path) -> None:
    def negate(scale: torch.Tensor, _: int) -> torch.Tensor:
        return -scale

    source = with_scales(negate).write(tmp_path / "source")
    out = convert_checkpoint(source, target, tmp_path / "out").output
    assert target == "bf16" or inspect_checkpoint(out, deep=True).ok
    assert verify_checkpoint(out, source, device="cpu").ok


@pytest.mark.parametrize("method", ["awq", "bitsandbytes", "fbgemm_fp8"])
def test_an_unknown_method_over_int8_weights_is_named(method: str, tmp_path: Path) -> None:
    model = Model()
    model.quantization["quant_method"] = method
    source = model.write(tmp_path / "source")
    assert (
        f"20 int8 modules under quant_method {method}, which is not read"
        in finding(source, "scheme-unsupported").message
    )
    assert refusal(source, "fused-int8").exit_code == 4
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out", scheme="ptpc_int8").output
    assert verify_checkpoint(out, source, device="cpu").ok


# Companions of weights


@pytest.mark.parametrize("leaf", ["smooth_scale", "pre_quant_scale", "smoothing_factor", "act_scale", "input_smooth"])
def test_factors_that_inputs_are_multiplied_by_are_an_error(leaf: str, tmp_path: Path) -> None:
    model = Model()
    model.set(f"{DOWN}.{leaf}", torch.rand(4) + 0.5)
    source = model.write(tmp_path)
    found = finding(source, "smoothing-online")
    assert (found.severity, found.subject, found.count) == ("error", f"{DOWN}.{leaf}", 1)
    for target in TARGETS:
        assert refusal(source, target).exit_code == 4
    result = verify_checkpoint(source, device="cpu")
    assert result.numbers.skipped == (
        "activations are multiplied by stored factors at run time, which the INT8 forward here does not do"
    )
    assert not result.ok


def test_tensors_of_unknown_meaning_beside_weights_are_named_by_every_command(tmp_path: Path) -> None:
    model = Model()
    model.set(f"{DOWN}.permutation", torch.arange(4))
    source = model.write(tmp_path / "source")
    assert codes(source) == {"companion-unknown": "warning"}
    result = convert_checkpoint(source, "quark", tmp_path / "out")
    assert "companion-unknown" in [item.code for item in result.plan.losses]
    assert [item.code for item in verify_checkpoint(result.output, device="cpu").findings] == ["companion-unknown"]


O_PROJ: Final = "model.layers.0.self_attn.o_proj"


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_zero_point", torch.full((8,), 3, dtype=torch.int8)),
        ("input_zero_point", torch.tensor(1, dtype=torch.int8)),
        ("weight_offset", torch.full((8,), 0.5)),
        ("weight_scale", torch.tensor([0.0, *[1.0] * 7])),
        ("weight_scale", torch.full((8,), torch.nan)),
        ("input_scale", torch.tensor(-1.0)),
    ],
)
def test_scales_and_zero_points_outside_of_experts_are_checked(name: str, value: torch.Tensor, tmp_path: Path) -> None:
    model = Model()
    if name == "input_scale":
        model.set(f"{O_PROJ}.weight_scale", torch.tensor(0.5))  # static activations go with one scale for the tensor
    model.set(f"{O_PROJ}.{name}", value)
    problems = verify_checkpoint(model.write(tmp_path), device="cpu").problems
    found = [(problem.tensor, problem.layer) for problem in problems if problem.stage == "numbers"]
    assert found == [(f"{O_PROJ}.{name}", 0)]


def test_a_scale_of_zero_over_codes_of_zero_is_harmless_outside_of_experts_too(tmp_path: Path) -> None:
    model = Model()
    model.first[f"{O_PROJ}.weight_scale"][2] = 0
    model.first[f"{O_PROJ}.weight"][2] = 0
    assert verify_checkpoint(model.write(tmp_path), device="cpu").ok


def test_zero_points_that_are_not_zero_are_not_proven(tmp_path: Path) -> None:
    model = Model()
    model.set(f"{DOWN}.weight_zero_point", torch.full((8,), 3, dtype=torch.int8))
    source = model.write(tmp_path / "source")
    result = verify_checkpoint(source, device="cpu")
    assert [(problem.tensor, problem.count) for problem in result.problems] == [(f"{DOWN}.weight_zero_point", 1)]
    with pytest.raises(UnsupportedError, match="zero point is not zero"):
        convert_checkpoint(source, "fused-int8", tmp_path / "out")


CACHE: Final = {
    "k_scale": "k_proj.output_scale", "attn.k_scale": "k_proj.output_scale", "k_proj.k_scale": "k_proj.output_scale",
    "qkv_proj.v_scale": "v_proj.output_scale", "mla_attn.mla_attn.k_scale": "k_proj.output_scale",
    "v_cache.scale": "v_proj.output_scale", "v_proj.output_scale": "v_proj.output_scale", "kv_scale": "kv_scale",
}  # fmt: skip


@pytest.mark.parametrize("name", CACHE)
def test_the_scale_of_the_cache_goes_with_its_setting_under_every_name(name: str, tmp_path: Path) -> None:
    attention = "model.layers.0.self_attn"
    model = Model()
    for projection in "kv":
        model.first |= int8_linear(f"{attention}.{projection}_proj", 8, 8)
    model.set(f"{attention}.{name}", torch.tensor(0.5))
    start = convert_checkpoint(model.write(tmp_path / "plain"), "compressed-tensors", tmp_path / "start").output
    assert not [stored for stored in load(start) if stored.endswith(name)]
    for projection in "kv":  # the same under compressed-tensors, with the setting
        model.quantization["exclude"].append(f"{attention}.{projection}_proj")
    config = json.loads((start / "config.json").read_text())
    cache = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
    config["quantization_config"]["kv_cache_scheme"] = cache
    model.config = config
    source = model.write(tmp_path / "source")
    assert "tensor-unrecognised" not in codes(source)
    kept = name if "output_scale" not in name else "v_scale"
    expected = {"fused-int8": kept, "compressed-tensors": kept, "quark": CACHE[name]}
    for target in TARGETS:
        out = convert_checkpoint(source, target, tmp_path / target).output
        found = [stored.removeprefix(f"{attention}.") for stored, tensor in load(out).items() if tensor.ndim == 0]
        assert found == ([expected[target]] if target in expected else []), target
        assert ("tensor-dropped" in losses(source, target)) is (target not in expected)


# Scales of other shapes and types, and codes that the config declares otherwise

SCALES: Final[dict[str, Callable[[torch.Tensor, int], torch.Tensor]]] = {
    "of groups": lambda scale, columns: scale[:, None].repeat(1, columns // 2),
    "of columns": lambda scale, columns: torch.ones(1, columns) if columns != len(scale) else scale[None],
    "of rows, lying down": lambda scale, _: scale[None],
    "in F64": lambda scale, _: scale.double(),
    "in whole numbers": lambda scale, _: (scale * 1000).int(),
}


@pytest.mark.parametrize("kind", SCALES)
def test_other_scales_are_unsupported_and_not_corrupt(kind: str, tmp_path: Path) -> None:
    source = with_scales(SCALES[kind]).write(tmp_path)
    assert set(codes(source)) <= {"scheme-unsupported", "scale-dtype"}
    for target in TARGETS:
        assert refusal(source, target).exit_code == 4
    with pytest.raises(QuarkconvError) as caught:
        verify_checkpoint(source, device="cpu")
    assert caught.value.exit_code == 4


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


def test_experts_with_static_scales_beside_dynamic_attention_are_dequantized(tmp_path: Path) -> None:
    model = Model()
    for prefix, shard in zip(EXPERTS, model.shards, strict=True):
        for name in [name for name in shard if name.startswith(prefix) and name.endswith("weight_scale")]:
            shard[name] = shard[name].amax()
            shard[name.replace("weight_scale", "input_scale")] = torch.tensor(0.02)
    source = model.write(tmp_path / "source")
    assert verify_checkpoint(convert_checkpoint(source, "bf16", tmp_path / "out").output, source, device="cpu").ok
    assert refusal(source, "fused-int8").exit_code == 4


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


@pytest.mark.parametrize(
    ("settings", "runs"),
    [
        ({}, True),
        ({"hidden_act": "mish"}, False),
        ({"swiglu_limit": [7.0, 7.0]}, False),
        ({"moe_latent_size": 4}, False),
        ({"num_experts_per_tok": 9}, False),
        ({"norm_topk_prob": None}, True),  # engines take the default of their class
    ],
)
def test_an_engine_has_no_verdict_on_a_function_that_is_not_known(
    settings: dict[str, Any], runs: bool, tmp_path: Path
) -> None:
    inspection = inspect_checkpoint(with_settings(**settings).write(tmp_path))
    assert any(row.verdict == "int8" for row in inspection.engines) is runs
    assert any("in int8" in item.text for item in inspection.advice) is runs
    assert ("not checked with these settings of the layers" in str(inspection.advice)) is not runs


@pytest.mark.parametrize("variant", ["biases", "a projection beside the others", "a norm of an expert"])
def test_an_engine_has_no_verdict_on_experts_that_its_class_does_not_have(variant: str, tmp_path: Path) -> None:
    inspection = inspect_checkpoint(UNKNOWN[variant]().write(tmp_path))
    assert not [row for row in inspection.engines if row.verdict in ("int8", "w8a16")]


@pytest.mark.parametrize(
    ("name", "shape"), [("weight_zero_point", (2,)), ("input_scale", (8,)), ("input_scale", (1, 8))]
)
def test_zero_points_and_input_scales_of_other_schemes_are_unsupported(
    name: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    """Zero points four to an integer, as formats of packed codes have them, and a scale for each input channel."""
    model = Model()
    model.set(f"{O_PROJ}.{name}", torch.ones(shape) if name == "input_scale" else torch.zeros(shape, dtype=torch.int32))
    source = model.write(tmp_path)
    for target in TARGETS:
        assert refusal(source, target).exit_code == 4


def test_zero_points_in_another_shape_of_as_many_values_are_read(tmp_path: Path) -> None:
    model = Model()
    model.set(f"{O_PROJ}.weight_zero_point", torch.zeros(8, 1))
    out = convert_checkpoint(model.write(tmp_path / "source"), "fused-int8", tmp_path / "out").output
    assert verify_checkpoint(out, tmp_path / "source", device="cpu").ok
    model.set(f"{O_PROJ}.weight_zero_point", torch.full((8, 1), 2.0))
    with pytest.raises(UnsupportedError, match="zero point is not zero"):
        convert_checkpoint(model.write(tmp_path / "other"), "fused-int8", tmp_path / "never")
