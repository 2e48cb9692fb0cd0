"""Quantization configs that are valid for their tool, and that engines refuse or read otherwise."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
from support.model import Model
from support.quark_config import TENSOR_WEIGHT, layer_config
from support.reported import codes, compressed_tensors, finding, refusal

from quarkconv import convert_checkpoint, inspect_checkpoint, verify_checkpoint
from quarkconv.targets import TARGETS

NOTHING: Final[dict[str, Any]] = {"weight": None, "input_tensors": None, "output_tensors": None, "bias": None}
FP8: Final = {**layer_config(), "weight": {**TENSOR_WEIGHT, "dtype": "fp8_e4m3"}}
PARTS: Final = ("gate_proj", "up_proj", "down_proj")


def verdicts(source: Path, form: str) -> set[str]:
    """What vLLM 0.33 does with a form of a checkpoint."""
    facts = [fact for fact in inspect_checkpoint(source).engines if fact.version.endswith(("0.33", ">=0.28"))]
    return {fact.verdict for fact in facts if (fact.engine, fact.form, fact.devices) == ("vllm", form, "")}


def of_experts_alone(model: Model) -> None:
    """Attention in float, by the null scheme of all other modules."""
    model.to_float("model.layers.0.self_attn", "model.layers.1.self_attn")
    model.quantization["layer_quant_config"] = {"*mlp.experts*": layer_config()}
    model.quantization["global_quant_config"] = copy.deepcopy(NOTHING)


def of_each_projection(model: Model) -> None:
    """Experts by the names of their projections, under another scheme of all other modules."""
    model.quantization["layer_quant_config"] = {f"*experts.*.{part}": layer_config() for part in PARTS}
    model.quantization["layer_quant_config"]["*self_attn*"] = layer_config()
    model.quantization["global_quant_config"] = copy.deepcopy(FP8)


QUARK: Final[dict[str, Callable[[Model], object]]] = {
    "no export": lambda model: model.quantization.pop("export"),
    "no group of the cache": lambda model: model.quantization["export"].pop("kv_cache_group"),
    "no table of types": lambda model: model.quantization.pop("layer_type_quant_config"),
    "no table of layers": lambda model: model.quantization.update(layer_quant_config=None),
    "attention in float by a null scheme": of_experts_alone,
    "experts by their projections": of_each_projection,
}


@pytest.mark.parametrize("variant", QUARK)
def test_a_quark_config_that_vllm_reads_otherwise_is_not_said_to_run(variant: str, tmp_path: Path) -> None:
    """``_find_matched_config`` and ``from_config`` of vLLM 0.28 to 0.33."""
    model = Model()
    assert "int8" in verdicts(model.write(tmp_path / "usual"), "quark")
    QUARK[variant](model)
    source = model.write(tmp_path / "source")
    assert codes(source) == {}
    assert verdicts(source, "quark") == {"fails"}
    out = convert_checkpoint(source, "quark", tmp_path / "out").output
    assert "int8" in verdicts(out, "quark")
    assert verify_checkpoint(out, source, device="cpu").verdict() == "Verified"


@pytest.mark.parametrize("key", ["model.layers.{}.mlp.experts.{}.{}", "*mlp.experts*", "*layers.{}.mlp.*"])
def test_experts_that_vllm_finds_under_their_module_run(key: str, tmp_path: Path) -> None:
    """A key without ``*`` matches there where it contains the name of the module."""
    model = Model()
    keys = {key.format(layer, expert, part) for layer in range(2) for expert in range(3) for part in PARTS}
    model.quantization["layer_quant_config"] = {name: layer_config() for name in (*sorted(keys), "*self_attn*")}
    model.quantization["global_quant_config"] = copy.deepcopy(FP8)
    assert "int8" in verdicts(model.write(tmp_path), "quark")


def with_format(**fields: Any) -> Model:
    model = Model()
    model.config["quantization_config"] = {**compressed_tensors([]), **fields}
    for shard in model.shards:
        shard |= {name: shard[name].reshape(-1, 1) for name in shard if name.endswith("_scale")}
    return model


@pytest.mark.parametrize("name", [None, "dense", "mixed-precision"])
def test_int8_under_a_format_without_activations_is_an_error(name: str | None, tmp_path: Path) -> None:
    source = with_format(format=name).write(tmp_path)
    assert codes(source) == {"quant-config-invalid": "error"}
    assert finding(source, "quant-config-invalid").subject == "quantization_config.format"
    assert verdicts(source, "compressed-tensors") == set()
    assert not {"int8", "w8a16"}.isdisjoint(verdicts(source, "fused-int8"))


def test_a_format_of_the_group_is_that_of_its_modules(tmp_path: Path) -> None:
    model = with_format(format="mixed-precision")
    model.quantization["config_groups"]["group_0"]["format"] = "naive-quantized"
    assert codes(model.write(tmp_path)) == {}


@pytest.mark.parametrize(
    ("weights", "inputs"),
    [
        ({"strategy": "channel"}, {"strategy": "token", "dynamic": True}),
        ({"strategy": "CHANNEL", "type": "INT"}, {"strategy": "Token", "dynamic": True}),
        ({"group_size": -1}, {"strategy": "token", "dynamic": True}),
    ],
)
def test_arguments_of_compressed_tensors_have_its_defaults(
    weights: dict[str, Any], inputs: dict[str, Any], tmp_path: Path
) -> None:
    """``QuantizationArgs``: int, 8 bits, symmetric, static; names in any case; -1 is a group of a whole row."""
    from compressed_tensors.quantization import QuantizationArgs

    parsed = QuantizationArgs.model_validate(weights)
    assert (parsed.type, parsed.num_bits, parsed.strategy, parsed.symmetric) == ("int", 8, "channel", True)
    model = with_format()
    model.quantization["config_groups"]["group_0"] |= {"weights": weights, "input_activations": inputs}
    inspection = inspect_checkpoint(model.write(tmp_path))
    assert (inspection.scheme, inspection.ok) == ("ptpc_int8", True)


def test_an_argument_that_compressed_tensors_refuses_is_not_said_to_run(tmp_path: Path) -> None:
    from compressed_tensors.quantization import QuantizationArgs
    from pydantic import ValidationError

    model = with_format()
    weights = model.quantization["config_groups"]["group_0"]["weights"]
    QuantizationArgs.model_validate(weights)
    weights["rounding"] = "floor"
    with pytest.raises(ValidationError):
        QuantizationArgs.model_validate(weights)
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert "config_groups.group_0.weights.rounding" in str(inspection.not_checked)
    assert verdicts(tmp_path, "compressed-tensors") == set()


@pytest.mark.parametrize(
    ("key", "rotates"),
    [("online-rotate", True), ("online_rotation_config", True), ("quarot", True), ("partial_rotary_factor", False)],
)
def test_rotations_that_config_json_declares_beside_the_quantization_are_an_error(
    key: str, rotates: bool, tmp_path: Path
) -> None:
    model = Model()
    model.config[key] = {"online_full_had": True, "tp_size": 16} if rotates else 0.5
    source = model.write(tmp_path)
    assert codes(source) == ({"rotation-online": "error"} if rotates else {})
    if rotates:
        assert finding(source, "rotation-online").subject == key
        assert {refusal(source, target).exit_code for target in TARGETS} == {4}


def test_a_rotation_that_is_switched_off_is_none(tmp_path: Path) -> None:
    model = Model()
    model.config["online_rotation"] = False
    assert codes(model.write(tmp_path)) == {}
