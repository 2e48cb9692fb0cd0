"""Checkpoints of llm-compressor, auto-round and msModelSlim: read, converted to every target, verified, and back."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from support.checkpoints import Tensors, assert_same_tensors, load
from support.expected import fused_int8
from support.exports import OTHER_TOOLS

import quarkconv
from quarkconv.targets import TARGETS

EXPERTS = {
    "qwen3_moe": ([0, 1], "gate_proj"),
    "glm4_moe": ([1], "gate_proj"),
    "mixtral": ([0, 1], "gate_proj"),
}
"""Family -> MoE layers, and name of a projection."""
INT8 = tuple(name for name in TARGETS if name != "bf16")


def family(name: str) -> str:
    return name.partition("-")[0]


def method(name: str) -> str:
    return "ascend" if "msmodelslim" in name else "compressed-tensors"


def widened(tensors: Tensors) -> Tensors:
    """The same with scales in F32, which has every value of BF16 and F16, and without offsets, which are zero."""
    return {
        name: tensor.float() if name.endswith("weight_scale") else tensor
        for name, tensor in tensors.items()
        if not name.endswith("weight_offset")
    }


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_the_scheme_and_the_experts_are_found(checkpoints: Callable[[str], Path], name: str) -> None:
    inspection = quarkconv.inspect_checkpoint(checkpoints(name), deep=True)
    description = inspection.description
    layers, gate = EXPERTS[family(name)]
    assert description.declared is not None
    assert (description.declared.method, description.scheme) == (method(name), "ptpc_int8")
    assert [layer.index for layer in description.int8_layers] == layers
    assert {layer.naming.gate for layer in description.int8_layers} == {gate}
    assert not description.errors()
    found = {item.code for item in inspection.findings}
    assert ("scale-narrow" in found) == ("msmodelslim" not in name)
    assert ("scale-negative" in found) == ("auto_round" in name)
    assert inspection.ok
    assert ("expert-names" in found) == (family(name) == "mixtral")


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_every_target_is_written_and_verified(
    checkpoints: Callable[[str], Path], tmp_path: Path, name: str, target: str
) -> None:
    source = checkpoints(name)
    output = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=2).output
    assert quarkconv.verify_checkpoint(output, source, "cpu", tokens=2).ok
    if target != "bf16":
        assert not quarkconv.inspect_checkpoint(output).description.errors()


@pytest.mark.parametrize("target", INT8)
@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_codes_and_scales_come_back(checkpoints: Callable[[str], Path], tmp_path: Path, name: str, target: str) -> None:
    source = checkpoints(name)
    output = quarkconv.convert_checkpoint(source, target, tmp_path / "out").output
    again = load(quarkconv.convert_checkpoint(output, "compressed-tensors", tmp_path / "again").output)
    if (family(name), target) == ("mixtral", "fused-int8"):  # which has the names of the published model
        published = {".w1.": ".gate_proj.", ".w3.": ".up_proj.", ".w2.": ".down_proj."}
        for old, new in published.items():
            again = {tensor.replace(old, new): value for tensor, value in again.items()}
    assert_same_tensors(again, widened(load(source)))


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_fused_experts_are_the_stacked_ones(checkpoints: Callable[[str], Path], tmp_path: Path, name: str) -> None:
    source = checkpoints(name)
    found = load(quarkconv.convert_checkpoint(source, "fused-int8", tmp_path / "out").output)
    stacked = fused_int8(source).items()
    expected = {key: value.contiguous() for key, value in stacked if not key.endswith("weight_offset")}
    if family(name) == "mixtral":  # vLLM's class drops fused tensors of other names without an error
        renamed = {"gate_up_proj": "w13", "experts.down_proj": "experts.w2"}
        for old, new in renamed.items():
            expected = {tensor.replace(old, new): value for tensor, value in expected.items()}
    assert_same_tensors(found, expected)


@pytest.mark.parametrize("name", OTHER_TOOLS)
def test_dequantized_weights_are_code_times_scale(
    checkpoints: Callable[[str], Path], tmp_path: Path, name: str
) -> None:
    source = load(checkpoints(name))
    output = load(quarkconv.convert_checkpoint(checkpoints(name), "bf16", tmp_path / "out").output)
    codes = [key for key, tensor in source.items() if tensor.dtype == torch.int8]
    assert codes
    for key in codes:
        exact = source[key].double() * source[f"{key}_scale"].double()
        assert torch.equal(output[key], exact.bfloat16()), key


def test_engines_that_do_not_know_the_names_are_not_recommended(checkpoints: Callable[[str], Path]) -> None:
    inspection = quarkconv.inspect_checkpoint(checkpoints("mixtral-llmcompressor0.14"))
    rows = {(fact.engine, fact.form, fact.version) for fact in inspection.engines if fact.verdict == "int8"}
    assert ("vllm", "compressed-tensors", "0.29 - 0.33") in rows
    assert not any(form == "compressed-tensors" and "0.28" in version for _, form, version in rows)
    renamed = quarkconv.inspect_checkpoint(checkpoints("mixtral-quark0.11-eager"))
    assert not any(item.code == "expert-names" for item in renamed.findings)


def test_ascend_is_what_msmodelslim_writes(checkpoints: Callable[[str], Path], tmp_path: Path) -> None:
    """The same tensors, bit for bit, and an entry of the same type for each."""
    source = checkpoints("qwen3_moe-msmodelslim26.1")
    fused = quarkconv.convert_checkpoint(source, "fused-int8", tmp_path / "fused").output
    output = quarkconv.convert_checkpoint(fused, "ascend", tmp_path / "ascend").output
    assert_same_tensors(load(output), load(source))
    theirs, ours = (json.loads((root / "quant_model_description.json").read_text()) for root in (source, output))
    assert ours == theirs
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
