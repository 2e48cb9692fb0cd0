"""Quantization configs in other places, under other names, or with settings of unknown meaning."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support.model import Model
from support.quark_config import WEIGHT, layer_config
from support.reported import bare, codes, finding, losses, refusal

from quarkconv import UnsupportedError, convert_checkpoint, inspect_checkpoint, plan_conversion, verify_checkpoint
from quarkconv.targets import TARGETS

_ARGUMENTS: Final = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel", "dynamic": False}
MODELOPT: Final = "hf_quant_config.json"


def compressed_tensors(activations: dict[str, Any] | None = None, **fields: Any) -> Model:
    """The model with the config that llm-compressor writes."""
    inputs = {**_ARGUMENTS, "strategy": "token", "dynamic": True, **(activations or {})}
    group = {"targets": ["Linear"], "weights": dict(_ARGUMENTS), "input_activations": inputs}
    model = Model()
    model.config["quantization_config"] = {
        "quant_method": "compressed-tensors", "format": "int-quantized", "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$"], **fields,
    }  # fmt: skip
    return model


def config_of(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())
    return found


@pytest.mark.parametrize(
    "activations",
    [
        {"symmetric": False},
        {"strategy": "tensor"},
        {"dynamic": "local", "strategy": "group", "group_size": 128},
        {"dynamic": False, "strategy": "channel"},
    ],
)
def test_other_activations_are_unsupported_and_not_corrupt(activations: dict[str, Any], tmp_path: Path) -> None:
    source = compressed_tensors(activations).write(tmp_path)
    assert codes(source) == {"scheme-unsupported": "error"}
    assert all(refusal(source, target).exit_code == 4 for target in TARGETS)


@pytest.mark.parametrize("method", ["compressed_tensors", "Compressed-Tensors"])
def test_a_method_is_read_as_engines_compare_it(method: str, tmp_path: Path) -> None:
    source = compressed_tensors(quant_method=method).write(tmp_path / "source")
    assert codes(source) == {}
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    assert config_of(out)["quantization_config"]["quant_method"] == "compressed-tensors"


def test_quark_is_read_in_capitals_too(tmp_path: Path) -> None:
    model = Model()
    model.quantization["quant_method"] = "Quark"
    assert codes(model.write(tmp_path)) == {}


@pytest.mark.parametrize("target", ["fused-int8", "bf16", "ascend"])
def test_a_config_under_its_older_key_is_read_and_replaced(target: str, tmp_path: Path) -> None:
    model = compressed_tensors()
    model.config["compression_config"] = model.config.pop("quantization_config")
    source = model.write(tmp_path / "source")
    assert codes(source) == {}
    out = convert_checkpoint(source, target, tmp_path / "out").output
    assert "compression_config" not in config_of(out)
    assert ("quantization_config" in config_of(out)) == (target == "fused-int8")


def test_a_second_config_that_differs_is_named_and_left_out(tmp_path: Path) -> None:
    model = Model()
    text = {
        key: model.config.pop(key) for key in list(model.config) if key not in ("quantization_config", "model_type")
    }
    model.config |= text | {"text_config": {**text, "model_type": "qwen3_moe", "quantization_config": {"bits": 4}}}
    source = model.write(tmp_path / "source")
    found = finding(source, "quant-config-invalid")
    assert (found.severity, found.subject, found.count) == ("warning", "text_config.quantization_config", 1)
    out = convert_checkpoint(source, "bf16", tmp_path / "out").output
    assert "quantization_config" not in str(config_of(out))
    assert verify_checkpoint(out, source, device="cpu").ok


def test_the_same_config_twice_is_no_finding(tmp_path: Path) -> None:
    model = Model()
    text = {key: value for key, value in model.config.items() if key != "architectures"}
    model.config = {"model_type": "qwen3_moe", "text_config": text, "quantization_config": model.quantization}
    assert codes(model.write(tmp_path)) == {}


@pytest.mark.parametrize("target", TARGETS)
def test_a_config_of_modelopt_beside_another_one_is_left_out(target: str, tmp_path: Path) -> None:
    """vLLM and SGLang read hf_quant_config.json where config.json declares nothing, as in bf16."""
    source = Model().write(tmp_path / "source")
    (source / MODELOPT).write_text(json.dumps({"quantization": {"quant_algo": "FP8"}}))
    assert losses(source, target) == {"setting-dropped": [MODELOPT]}
    assert not (convert_checkpoint(source, target, tmp_path / "out").output / MODELOPT).exists()


def test_int8_under_a_config_of_modelopt_is_not_implied(tmp_path: Path) -> None:
    source = bare().write(tmp_path / "source")
    (source / MODELOPT).write_text(json.dumps({"quantization": {"quant_algo": "W8A8_SQ_PER_CHANNEL"}}))
    found = finding(source, "scheme-unsupported")
    assert (found.severity, found.subject) == ("error", MODELOPT)
    assert "the unsupported quant_method modelopt" in found.message
    assert refusal(source, "fused-int8").exit_code == 4
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out", scheme="ptpc_int8").output
    assert verify_checkpoint(out, source, device="cpu").ok


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sparsity_config": {"format": "sparse-24-bitmask", "targets": ["Linear"]}}, ["sparsity_config"]),
        ({"low_rank_config": {"rank": 32}}, ["low_rank_config"]),
        ({"sparsity_config": {"format": "dense", "targets": []}}, []),
        ({"low_rank_config": None}, []),
    ],
)
def test_settings_of_unknown_meaning_are_not_sound(settings: dict[str, Any], named: list[str], tmp_path: Path) -> None:
    source = compressed_tensors(**settings).write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert inspection.headline.startswith("Sound") is not bool(named)
    assert [name for name in named if name in str(inspection.not_checked)] == named
    assert any(row.form == "compressed-tensors" for row in inspection.engines) is not bool(named)
    for target in ("fused-int8", "compressed-tensors"):
        expected = {"setting-dropped": [f"quantization_config.{name}" for name in named]} if named else {}
        assert losses(source, target) == expected
        assert set(named).isdisjoint(plan_conversion(source, target).config["quantization_config"])


@pytest.mark.parametrize(("name", "known"), [("smooth", True), ("gptq", True), ("svdquant", False)])
def test_an_algorithm_of_unknown_meaning_is_not_sound(name: str, known: bool, tmp_path: Path) -> None:
    model = Model()
    model.quantization["algo_config"] = [{"name": name}]
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert inspection.headline.startswith("Sound") is known
    assert (f"algo_config {name}" in str(inspection.not_checked)) is not known


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"softmax_quant_spec": {"dtype": "fp8_e4m3", "qscheme": "per_tensor"}}, "softmax_quant_spec"),
        ({"layer_quant_config": {"*o_proj": {**layer_config(), "output_tensors": WEIGHT}}}, "*o_proj.output_tensors"),
        ({"layer_quant_config": {"*o_proj": {**layer_config(), "bias": WEIGHT}}}, "layer_quant_config.*o_proj.bias"),
    ],
)
def test_what_quark_quantizes_beside_weights_and_inputs_is_not_sound(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    model = Model()
    model.quantization.update(settings)
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert (inspection.ok, inspection.headline.startswith("Sound")) == (True, False)
    assert named in str(inspection.not_checked)
    assert not [row for row in inspection.engines if row.form == "quark"]


def test_a_description_of_ascend_is_read_beside_a_method_that_is_not(tmp_path: Path) -> None:
    source = convert_checkpoint(Model().write(tmp_path / "source"), "ascend", tmp_path / "ascend").output
    config = config_of(source) | {"quantization_config": {"quant_method": "ascend"}}
    (source / "config.json").write_text(json.dumps(config))
    assert codes(source) == {}
    assert inspect_checkpoint(source).scheme == "ptpc_int8"


def simulated() -> Model:
    """Weights that were quantized in simulation: in float, with their scales."""
    model = compressed_tensors(quantization_status="frozen")
    for shard in model.shards:
        for name in list(shard):
            if shard[name].dtype == torch.int8:
                shard[name] = (shard[name].float() * shard[f"{name}_scale"].reshape(-1, 1)).bfloat16()
    return model


def test_float_weights_with_scales_are_named_and_not_quantized(tmp_path: Path) -> None:
    """They may also be codes in float: quantizing them again would then lose the scales."""
    source = simulated().write(tmp_path)
    assert finding(source, "companion-unknown").count == 20
    with pytest.raises(UnsupportedError, match="may hold codes or values"):
        plan_conversion(source, "fused-int8", quantize="missing")


def test_experts_of_which_some_are_float_are_named_as_mixed(tmp_path: Path) -> None:
    model = Model()
    model.quantization["exclude"].append("*.experts.[02].*")
    model.to_float(*(f"model.layers.{layer}.mlp.experts.{number}." for layer in range(2) for number in (0, 2)))
    error = refusal(model.write(tmp_path), "compressed-tensors")
    assert (error.exit_code, "mixes experts in int8 and in float" in error.message) == (4, True)


def test_experts_that_are_ignored_as_a_whole_and_stored_in_int8_are_an_error(tmp_path: Path) -> None:
    """Engines look up the module of all experts, and leave them in float."""
    source = compressed_tensors(ignore=["lm_head", "re:.*mlp.gate$", "model.layers.0.mlp.experts"]).write(tmp_path)
    found = finding(source, "excluded-but-quantized")
    assert (found.severity, found.subject, found.count) == ("error", "model.layers.0.mlp.experts", 1)


@pytest.mark.parametrize(("kind", "runs"), [("float", True), ("int", False)])
def test_a_cache_that_engines_refuse_is_neither_sound_nor_carried_over(kind: str, runs: bool, tmp_path: Path) -> None:
    scheme = {"num_bits": 8, "type": kind, "strategy": "tensor", "symmetric": True, "dynamic": False}
    model, name = compressed_tensors(kv_cache_scheme=scheme), "model.layers.0.self_attn.k_scale"
    model.set(name, torch.tensor(0.5))
    source = model.write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert inspection.headline.startswith("Sound") is runs
    assert ("the key-value cache" in str(inspection.not_checked)) is not runs
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    assert ("kv_cache_scheme" in config_of(out)["quantization_config"]) is runs
    dropped = {"setting-dropped": ["quantization_config.kv_cache"], "tensor-dropped": [name]}
    assert losses(source, "fused-int8") == ({} if runs else dropped)
