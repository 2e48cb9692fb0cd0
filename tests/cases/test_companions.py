"""Scales, zero points and other tensors beside weights, in the forms that tools write them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest
import torch
from support.model import Model, int8_linear
from support.quark_config import TENSOR_WEIGHT, layer_config
from support.reported import codes, finding, load, losses, refusal

from quarkconv import QuarkconvError, UnsupportedError, convert_checkpoint, inspect_checkpoint, verify_checkpoint
from quarkconv.targets import TARGETS

EXPERTS: Final = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(2))
DOWN: Final = f"{EXPERTS[0]}.0.down_proj"


def with_scales(change: Callable[[torch.Tensor, int], torch.Tensor]) -> Model:
    """A model whose scales are changed, by the number of their weight's columns."""
    model = Model()
    for shard in model.shards:
        for name in [name for name in shard if name.endswith("weight_scale")]:
            shard[name] = change(shard[name], shard[name.removesuffix("_scale")].shape[1]).contiguous()
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_negative_scales_stay_sound_in_every_target(target: str, tmp_path: Path) -> None:
    def negate(scale: torch.Tensor, _: int) -> torch.Tensor:
        return -scale

    source = with_scales(negate).write(tmp_path / "source")
    out = convert_checkpoint(source, target, tmp_path / "out").output
    assert target == "bf16" or inspect_checkpoint(out, deep=True).ok
    assert verify_checkpoint(out, source, device="cpu").ok


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
        "activations are multiplied by stored factors at run time, which quarkconv's INT8 forward does not do"
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


@pytest.mark.parametrize(
    "name", ["self_attn.k_scale", "self_attn.q_scale", "self_attn.prob_scale", "mlp.experts.0.down_proj.output_scale"]
)
def test_scales_of_outputs_that_no_setting_declares_are_not_sound(name: str, tmp_path: Path) -> None:
    model, name = Model(), f"model.layers.0.{name}"
    model.set(name, torch.tensor(0.5))
    source = model.write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert (codes(source), finding(source, "output-scales").subject) == ({"output-scales": "warning"}, name)
    assert not inspection.headline.startswith("Sound")
    assert not any(fact.verdict == "int8" for fact in inspection.engines)
    result = convert_checkpoint(source, "fused-int8", tmp_path / "out")
    assert {item.code: item.subject for item in result.plan.losses} == {"output-scales": name, "tensor-dropped": name}
    assert name not in load(result.output)
    assert codes(result.output) == {}


def test_a_cache_that_is_declared_without_its_scales_is_not_sound(tmp_path: Path) -> None:
    """vLLM 0.33 then takes 1.0 for each (``kv_cache.py``, BaseKVCacheMethod)."""
    model = Model()
    cached = {**layer_config(), "output_tensors": {**TENSOR_WEIGHT, "dtype": "fp8_e4m3"}}
    model.quantization["layer_quant_config"] = {"*k_proj": cached, "*v_proj": cached}
    model.quantization["export"]["kv_cache_group"] = ["*k_proj", "*v_proj"]
    source = model.write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert (codes(source), inspection.headline.startswith("Sound")) == ({"output-scales": "warning"}, False)
    assert not any(fact.verdict == "int8" for fact in inspection.engines)
    for module in ("k_proj", "v_proj"):
        model.first |= int8_linear(f"model.layers.0.self_attn.{module}", 8, 8)
        model.set(f"model.layers.0.self_attn.{module}.output_scale", torch.tensor(0.5))
    assert codes(model.write(tmp_path / "whole")) == {}


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


def test_experts_with_static_scales_beside_dynamic_attention_are_dequantized(tmp_path: Path) -> None:
    model = Model()
    for prefix, shard in zip(EXPERTS, model.shards, strict=True):
        for name in [name for name in shard if name.startswith(prefix) and name.endswith("weight_scale")]:
            shard[name] = shard[name].amax()
            shard[name.replace("weight_scale", "input_scale")] = torch.tensor(0.02)
    source = model.write(tmp_path / "source")
    assert verify_checkpoint(convert_checkpoint(source, "bf16", tmp_path / "out").output, source, device="cpu").ok
    assert refusal(source, "fused-int8").exit_code == 4


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_zero_points_of_minus_zero_are_zero(dtype: torch.dtype, tmp_path: Path) -> None:
    model, name = Model(), "model.layers.0.mlp.experts.0.up_proj.weight_zero_point"
    model.set(name, -torch.zeros(4, dtype=dtype))
    source = model.write(tmp_path / "source")
    assert "zero-point-nonzero" not in {item.code for item in inspect_checkpoint(source, deep=True).findings}
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    assert verify_checkpoint(out, source, device="cpu", tokens=2).problems == ()
    model.set(name, torch.tensor([0, 0, -0.0, -1e-3]).to(dtype))
    source = model.write(tmp_path / "not zero")
    assert "zero-point-nonzero" in {item.code for item in inspect_checkpoint(source, deep=True).findings}
    with pytest.raises(UnsupportedError, match="A zero point is not zero"):
        convert_checkpoint(source, "fused-int8", tmp_path / "refused")
