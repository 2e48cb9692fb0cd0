"""What users of quantized mixtures of experts reported, rebuilt small, each with the right answer."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support.model import Model
from support.reported import (
    ATTENTION,
    FP8,
    GATES,
    bare,
    codes,
    excluded_experts,
    finding,
    ignored,
    int8_routers,
    kv_scales,
    load,
    losses,
    named_after_the_quantizer,
    refusal,
    rotated,
    two_stacks,
    with_mtp,
    with_probabilities,
    with_scales_named_inv,
)

from quarkconv import QuarkconvError, convert_checkpoint, inspect_checkpoint, plan_conversion, verify_checkpoint
from quarkconv.description.description import describe
from quarkconv.targets import TARGETS

# Routers and heads in int8, as a script that excludes only lm_head writes them (vLLM 46765)


def test_int8_routers_are_an_error(tmp_path: Path) -> None:
    found = finding(int8_routers().write(tmp_path), "float-module-quantized")
    assert (found.severity, found.count, found.subject) == ("error", 2, GATES[0])


@pytest.mark.parametrize("target", TARGETS)
def test_conversion_dequantizes_routers_with_one_rounding(target: str, tmp_path: Path) -> None:
    source = int8_routers().write(tmp_path / "source")
    before, out = load(source), convert_checkpoint(source, target, tmp_path / "out").output
    after = load(out)
    for gate in GATES:
        exact = before[f"{gate}.weight"].double() * before[f"{gate}.weight_scale"].double()[:, None]
        assert torch.equal(after[f"{gate}.weight"], exact.float().bfloat16())
        assert f"{gate}.weight_scale" not in after
    if target != "bf16":
        assert losses(source, target)["module-dequantized"] == [GATES[0]]
    if target not in ("bf16", "ascend"):
        assert set(GATES) <= set(ignored(out))
    if target != "bf16":
        assert "float-module-quantized" not in codes(out)
    plan = plan_conversion(source, target)
    assert inspect_checkpoint(source).targets[target].nbytes == plan.tensor_bytes


def test_a_float_router_that_the_config_declares_quantized_is_not_an_error(tmp_path: Path) -> None:
    model = Model()
    model.quantization["exclude"] = []
    assert codes(model.write(tmp_path)) == {}


# Scales of the key-value cache, of queries and of attention probabilities


def output_scales(folder: Path) -> set[str]:
    ends = ("output_scale", ".k_scale", ".v_scale")
    return {name.removeprefix(f"{ATTENTION}.") for name in load(folder) if name.endswith(ends)}


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("fused-int8", {"k_scale", "v_scale"}),
        ("compressed-tensors", {"k_scale", "v_scale"}),
        ("w8a8-int8", set()),
        ("bf16", set()),
        ("quark", {"prob_output_scale", *(f"{name}_proj.output_scale" for name in "qkv")}),
    ],
)
def test_the_scale_of_an_output_goes_where_its_setting_goes(target: str, kept: set[str], tmp_path: Path) -> None:
    source = with_probabilities().write(tmp_path / "source")
    assert codes(source) == {}
    out = convert_checkpoint(source, target, tmp_path / "out").output
    assert output_scales(out) == kept
    lost = losses(source, target)
    assert ("tensor-dropped" in lost) is (len(kept) < 4)
    quantization = json.loads((out / "config.json").read_text()).get("quantization_config", {})
    assert bool(quantization.get("kv_cache_scheme")) is (target in ("fused-int8", "compressed-tensors"))
    if target == "quark":
        assert "setting-dropped" not in lost
        assert quantization["layer_quant_config"]["*q_proj"]["output_tensors"] == FP8


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "w8a8-int8", "bf16"])
def test_the_cache_of_a_latent_is_left_out_with_its_setting(target: str, tmp_path: Path) -> None:
    source = kv_scales("kv_b_proj").write(tmp_path / "source")
    out = convert_checkpoint(source, target, tmp_path / "out").output
    assert output_scales(out) == set()
    assert "kv_cache" in str(losses(source, target)["setting-dropped"])
    assert "kv_cache_scheme" not in json.loads((out / "config.json").read_text()).get("quantization_config", {})


# Scales that are named after the quantizer (amd/Quark 44)


@pytest.mark.parametrize("target", TARGETS)
def test_scales_are_read_under_either_name(target: str, tmp_path: Path) -> None:
    usual, other = Model().write(tmp_path / "usual"), named_after_the_quantizer(Model()).write(tmp_path / "other")
    assert not any("weight_scale" in name for name in load(other))
    assert codes(other) == {"quantizer-names": "warning"}
    expected = load(convert_checkpoint(usual, target, tmp_path / "a").output)
    found = load(convert_checkpoint(other, target, tmp_path / "b").output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_engine_loads_scales_named_after_the_quantizer(tmp_path: Path) -> None:
    inspection = inspect_checkpoint(named_after_the_quantizer(Model()).write(tmp_path))
    assert not [row for row in inspection.engines if row.form == "quark"]
    assert all(item.target is not None for item in inspection.advice)


# Channel INT8 without a config, with SGLang's, and in blocks (SGLang 3888)


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_that_leave_no_doubt_need_no_config(target: str, tmp_path: Path) -> None:
    source, declared = bare().write(tmp_path / "bare"), Model().write(tmp_path / "declared")
    assert codes(source) == {"scheme-implied": "warning"}
    assert inspect_checkpoint(source).scheme == "ptpc_int8"
    expected = load(convert_checkpoint(declared, target, tmp_path / "a").output)
    found = load(convert_checkpoint(source, target, tmp_path / "b").output)
    assert all(torch.equal(found[name], expected[name]) for name in expected | found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_scale", torch.tensor(0.5)),
        ("weight_zero_point", torch.zeros(8, dtype=torch.int8)),
        ("input_scale", torch.tensor(0.5)),
    ],
)
def test_tensors_that_leave_a_doubt_need_a_config(name: str, value: torch.Tensor, tmp_path: Path) -> None:
    model = bare()
    model.set(f"{ATTENTION}.o_proj.{name}", value)
    source = model.write(tmp_path)
    assert codes(source)["quant-config-missing"] == "error"
    assert refusal(source, "fused-int8").exit_code == 4


def test_the_config_of_w8a8_int8_gives_no_errors(tmp_path: Path) -> None:
    model = Model()
    model.config["quantization_config"] = {
        "quant_method": "w8a8_int8", "activation_scheme": "dynamic", "bits": 8, "group_size": -1,
    }  # fmt: skip
    source = model.write(tmp_path)
    assert codes(source) == {}
    assert losses(source, "fused-int8") == {}


@pytest.mark.parametrize("declared", [True, False])
def test_scales_of_blocks_are_unsupported_and_not_missing(declared: bool, tmp_path: Path) -> None:
    model = bare()
    for shard in model.shards:
        for name in [name for name in shard if name.endswith("weight_scale")]:
            del shard[name]
            shard[name + "_inv"] = torch.ones(1, 1)
    if declared:
        model.config["quantization_config"] = {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}
    source = model.write(tmp_path)
    assert {"scale-missing", "companion-unknown"}.isdisjoint(codes(source))
    assert codes(source)["scheme-unsupported"] == "error"
    for target in TARGETS:
        assert refusal(source, target).exit_code == 4
    with pytest.raises(QuarkconvError, match="cannot be verified") as caught:
        verify_checkpoint(source, device="cpu")
    assert caught.value.exit_code == 4


@pytest.mark.parametrize("shape", [(-1,), (-1, 1)])
@pytest.mark.parametrize("target", TARGETS)
def test_scales_of_rows_are_read_under_the_name_of_scales_of_blocks(
    target: str, shape: tuple[int, ...], tmp_path: Path
) -> None:
    usual = Model().write(tmp_path / "usual")
    other = with_scales_named_inv(Model(), shape).write(tmp_path / "other")
    assert codes(other) == {"quantizer-names": "warning"}
    assert not [row for row in inspect_checkpoint(other).engines if row.form == "quark"]
    expected = load(convert_checkpoint(usual, target, tmp_path / "a").output)
    out = convert_checkpoint(other, target, tmp_path / "b").output
    found = load(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert verify_checkpoint(out, other, device="cpu").ok


@pytest.mark.parametrize("scale", [(1, 1), (1, 8), (4, 2)])
def test_scales_named_as_those_of_blocks_in_other_shapes_are_unsupported(
    scale: tuple[int, ...], tmp_path: Path
) -> None:
    model = Model()
    model.set(f"{ATTENTION}.o_proj.weight_scale_inv", torch.ones(scale))
    del model.first[f"{ATTENTION}.o_proj.weight_scale"]
    source = model.write(tmp_path)
    assert f"the first is {list(scale)} for a weight [8, 8]" in finding(source, "scheme-unsupported").message
    assert refusal(source, "fused-int8").exit_code == 4


# Rotations that are computed at run time


@pytest.mark.parametrize("hidden", ["tensors", "setting", "nothing"])
def test_online_rotations_are_an_error_and_converted_to_nothing(hidden: str, tmp_path: Path) -> None:
    model = rotated()
    if hidden == "setting":
        model.quantization["algo_config"] = None
    if hidden == "tensors":
        model.remove(*[name for name in model.first if name.endswith("input_rotation")])
    source = model.write(tmp_path)
    assert codes(source) == {"rotation-online": "error"}
    for target in TARGETS:
        error = refusal(source, target)
        assert (error.exit_code, "rotat" in str(error)) == (4, True)
    assert not [row for row in inspect_checkpoint(source).engines if row.verdict == "int8"]
    result = verify_checkpoint(source, device="cpu")
    assert result.numbers.skipped == "activations are rotated at run time, which quarkconv's INT8 forward does not do"
    assert not result.ok


@pytest.mark.parametrize(
    "algorithm", [{"name": "smoothquant", "alpha": 0.5}, {"name": "rotation", "r1": True, "r2": True}]
)
def test_rotations_merged_into_the_weights_are_not_an_error(algorithm: dict[str, Any], tmp_path: Path) -> None:
    model = Model()
    model.quantization["algo_config"] = [algorithm]
    assert codes(model.write(tmp_path)) == {}


# What convert wrote, verify accepts


VARIANTS: Final[dict[str, Callable[[], Model]]] = {
    "plain": Model,
    "int8 routers": int8_routers,
    "quantized outputs": with_probabilities,
    "names of the quantizer": lambda: named_after_the_quantizer(Model()),
    "no config": bare,
    "fused layer of prediction": lambda: with_mtp("fused"),
    "layer of prediction": lambda: with_mtp("split"),
    "excluded experts": excluded_experts,
    "two stacks": two_stacks,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_config_and_tensors_of_every_output_agree(variant: str, target: str, tmp_path: Path) -> None:
    source = VARIANTS[variant]().write(tmp_path / "source")
    out = convert_checkpoint(source, target, tmp_path / "out").output
    blocked = {"not-moe", "quant-config-missing"} if target == "bf16" else set()
    errors = {item.code for item in describe(out).errors()} - blocked
    assert errors == set()
    assert verify_checkpoint(out, device="cpu", stages=("bytes",)).ok
