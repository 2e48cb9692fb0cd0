"""Attention in FP8 beside experts in INT8: kept where a compressed-tensors config says both, refused elsewhere.

compressed-tensors' own classes read the config, give each module its scheme, and dequantize.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import pytest
import torch
from support.checkpoints import Tensors, load
from support.reported import FP8_ATTENTION, FP8_BLOCKS, PREDICTION, fp8_layer, with_fp8_attention, with_fp8_blocks

import quarkconv
from quarkconv.targets import TARGETS

if TYPE_CHECKING:  # a late import elsewhere: every worker imports every module of tests, and this takes 4 s
    from compressed_tensors.quantization import QuantizationScheme

KEEPING: Final = ("compressed-tensors", "fused-int8")


def quantization(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "config.json").read_text())["quantization_config"]
    return found


def schemes(folder: Path) -> dict[str, QuantizationScheme | None]:
    """Module -> the scheme that compressed-tensors gives it."""
    from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config

    root = torch.nn.Module()
    tensors = load(folder)
    names = [name.removesuffix(".weight") for name, value in tensors.items() if name.endswith(".weight")]
    names = [name for name in names if tensors[f"{name}.weight"].dim() == 2 and "embed" not in name]
    for name in names:
        *parents, leaf = name.split(".")
        module = root
        for parent in parents:
            if not hasattr(module, parent):
                module.add_module(parent, torch.nn.Module())
            module = getattr(module, parent)
        rows, columns = tensors[f"{name}.weight"].shape
        module.add_module(leaf, torch.nn.Linear(columns, rows, bias=False))
    apply_quantization_config(root, QuantizationConfig.model_validate(quantization(folder)))
    return {name: getattr(root.get_submodule(name), "quantization_scheme", None) for name in names}


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("per_channel", [False, True])
def test_compressed_tensors_gives_each_module_its_scheme(per_channel: bool, static: bool, tmp_path: Path) -> None:
    source = with_fp8_attention(per_channel=per_channel, static=static).write(tmp_path / "source")
    out = quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    found = schemes(out)
    for name, scheme in found.items():
        if name in FP8_ATTENTION:
            assert scheme is not None, name
            assert scheme.weights is not None
            assert scheme.input_activations is not None
            assert (scheme.format, scheme.weights.type, scheme.weights.num_bits) == ("float-quantized", "float", 8)
            assert scheme.weights.strategy == ("channel" if per_channel else "tensor")
            assert scheme.input_activations.dynamic is not static
        elif ".experts." in name:
            assert scheme is not None, name
            assert scheme.weights is not None
            assert (scheme.format, scheme.weights.type, scheme.weights.strategy) == ("int-quantized", "int", "channel")
        else:
            assert scheme is None, name
    assert sum(".experts." in name for name in found) == 18


@pytest.mark.parametrize("per_channel", [False, True])
@pytest.mark.parametrize("target", KEEPING)
def test_compressed_tensors_dequantizes_to_the_weights_of_the_source(
    target: str, per_channel: bool, tmp_path: Path
) -> None:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    source = with_fp8_attention(per_channel=per_channel, static=True).write(tmp_path / "source")
    before: Tensors = load(source)
    after: Tensors = load(quarkconv.convert_checkpoint(source, target, tmp_path / "out").output)
    group = QuantizationConfig.model_validate(quantization(tmp_path / "out")).config_groups["group_1"]
    assert isinstance(group, QuantizationScheme)
    for module in FP8_ATTENTION:
        scale = before[f"{module}.weight_scale"].float().reshape(-1, 1)
        assert after[f"{module}.weight_scale"].shape == ((8, 1) if per_channel else (1,))
        found = dequantize(
            after[f"{module}.weight"], after[f"{module}.weight_scale"], args=group.weights, dtype=torch.float32
        )
        assert torch.equal(found, before[f"{module}.weight"].float() * scale)
        assert torch.equal(after[f"{module}.input_scale"], before[f"{module}.input_scale"].reshape(1))


@pytest.mark.parametrize("target", KEEPING)
def test_what_was_written_agrees_and_can_be_converted_again(target: str, tmp_path: Path) -> None:
    source = with_fp8_attention().write(tmp_path / "source")
    inspection = quarkconv.inspect_checkpoint(source)
    assert inspection.ok
    assert inspection.scheme == "ptpc_int8"
    assert [(item.code, item.count) for item in inspection.findings if item.code != "scale-narrow"] == [
        ("mixed-precision", 4)
    ]
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out").output
    assert inspection.targets[target].nbytes == quarkconv.plan_conversion(source, target).tensor_bytes
    assert quarkconv.inspect_checkpoint(out).ok
    assert quarkconv.verify_checkpoint(out, source, device="cpu").ok
    again = quarkconv.convert_checkpoint(out, "compressed-tensors", tmp_path / "again").output
    first = quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "first").output
    before, after = load(first), load(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name].view(torch.uint8), after[name].view(torch.uint8)) for name in before)


@pytest.mark.parametrize("target", [name for name in TARGETS if name not in KEEPING])
def test_targets_of_one_scheme_name_the_refused_modules(target: str, tmp_path: Path) -> None:
    source = with_fp8_attention().write(tmp_path / "source")
    with pytest.raises(quarkconv.UnsupportedError, match="4 linears in FP8 beside INT8 experts") as caught:
        quarkconv.plan_conversion(source, target)
    assert caught.value.exit_code == 4
    assert FP8_ATTENTION[1] in str(caught.value)


def test_engines_have_no_verdict_on_untested_forms(tmp_path: Path) -> None:
    inspection = quarkconv.inspect_checkpoint(with_fp8_attention().write(tmp_path / "source"))
    assert {row.verdict for row in inspection.engines} >= {"not checked"}
    assert not {row.verdict for row in inspection.engines} & {"int8", "w8a16"}
    assert all("FP8" in item.text for item in inspection.advice)


@pytest.mark.parametrize("wrong", ["not declared", "blocks", "experts"])
def test_fp8_that_no_group_expresses_is_unsupported(wrong: str, tmp_path: Path) -> None:
    model = with_fp8_attention()
    if wrong == "not declared":
        model.quantization["layer_quant_config"] = {}
    if wrong == "blocks":
        model.set(f"{FP8_ATTENTION[0]}.weight_scale", torch.ones(2, 2))
    if wrong == "experts":
        name = "model.layers.0.mlp.experts.0.up_proj"
        model.set(f"{name}.weight", torch.ones(4, 8).to(torch.float8_e4m3fn))
        model.quantization["layer_quant_config"][name] = fp8_layer(per_channel=True, static=False)
    source = model.write(tmp_path / "source")
    with pytest.raises(quarkconv.UnsupportedError, match="scheme-unsupported"):
        quarkconv.plan_conversion(source, "compressed-tensors")


# Scales for each block, as DeepSeek stores them: attention, and layers of multi-token prediction


def block_group(folder: Path) -> QuantizationScheme:
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    group = QuantizationConfig.model_validate(quantization(folder)).config_groups["group_1"]
    assert isinstance(group, QuantizationScheme)
    return group


@pytest.mark.parametrize("prediction", [False, True])
@pytest.mark.parametrize("target", KEEPING)
def test_blocks_of_fp8_keep_their_codes_and_scales(target: str, prediction: bool, tmp_path: Path) -> None:
    source = with_fp8_blocks(prediction=prediction).write(tmp_path / "source")
    before, inspection = load(source), quarkconv.inspect_checkpoint(source)
    count = 10 if prediction else 1
    found = {item.code: item.count for item in inspection.findings}
    assert found == {"mixed-precision": count, "dtype-mismatch": count}
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out").output
    after, group = load(out), block_group(out)
    assert inspection.targets[target].nbytes == quarkconv.plan_conversion(source, target).tensor_bytes
    assert quarkconv.inspect_checkpoint(out).ok
    result = quarkconv.verify_checkpoint(out, source, device="cpu")
    assert result.ok
    assert {item.code for item in result.findings} == {"mixed-precision"}
    assert group.weights is not None
    assert group.input_activations is not None
    assert (group.weights.strategy, group.weights.block_structure) == ("block", [128, 128])
    assert (group.input_activations.strategy, group.input_activations.group_size) == ("group", 128)
    modules = [name.removesuffix("_scale_inv") for name in before if name.endswith("_scale_inv")]
    assert len(modules) == count
    for name in modules:
        assert torch.equal(after[name].view(torch.uint8), before[name].view(torch.uint8))
        assert torch.equal(after[f"{name}_scale"], before[f"{name}_scale_inv"])
        assert f"{name}_scale_inv" not in after
        assert name.removesuffix(".weight") in group.targets
    assert not set(quantization(out)["ignore"]) & set(group.targets)
    again = quarkconv.convert_checkpoint(out, "compressed-tensors", tmp_path / "again").output
    assert all(torch.equal(load(again)[name].view(torch.uint8), after[name].view(torch.uint8)) for name in modules)


def test_compressed_tensors_dequantizes_blocks_to_the_weights_of_the_source(tmp_path: Path) -> None:
    from compressed_tensors.quantization.lifecycle.forward import dequantize

    source = with_fp8_blocks().write(tmp_path / "source")
    out = quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    before, after = load(source), load(out)
    scales = before[f"{FP8_BLOCKS}.weight_scale_inv"]
    wide = scales.repeat_interleave(128, 0)[:200].repeat_interleave(128, 1)[:, :130]
    found = dequantize(
        after[f"{FP8_BLOCKS}.weight"],
        after[f"{FP8_BLOCKS}.weight_scale"],
        args=block_group(out).weights,
        dtype=torch.float32,
    )
    assert torch.equal(found, before[f"{FP8_BLOCKS}.weight"].float() * wide)


def test_a_layer_of_experts_that_is_fp8_in_part_is_unsupported(tmp_path: Path) -> None:
    model = with_fp8_blocks(prediction=True)
    name = f"{PREDICTION}.1.up_proj.weight"
    model.set(name, torch.rand(4, 8).bfloat16())
    model.remove(f"{name}_scale_inv")
    with pytest.raises(quarkconv.UnsupportedError, match="F8_E4M3"):
        quarkconv.plan_conversion(model.write(tmp_path), "compressed-tensors")


def test_layers_of_prediction_in_fp8_are_not_quantized_again(tmp_path: Path) -> None:
    source = with_fp8_blocks(prediction=True).write(tmp_path)
    with pytest.raises(quarkconv.UnsupportedError, match="does not quantize weights that are already quantized"):
        quarkconv.plan_conversion(source, "compressed-tensors", mtp="quantize")
    with pytest.raises(quarkconv.UnsupportedError, match="in FP8 beside INT8 experts"):
        quarkconv.plan_conversion(source, "quark")
    plan = quarkconv.plan_conversion(source, "compressed-tensors", mtp="drop")
    assert not [tensor.name for shard in plan.shards for tensor in shard.tensors if tensor.name.startswith("mtp.")]
