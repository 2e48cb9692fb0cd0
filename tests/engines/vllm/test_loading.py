"""vLLM's own loader on what is converted: every parameter of its model holds what stacking the Quark export gives.

The parameters are poisoned before: one that vLLM leaves alone, for a name that it skips in silence, is found.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from engines.expected import RANKS, WHOLE, Rank, Stacked
from engines.forms import QUARK, Forms
from engines.vllm.loading import build, load
from support.checkpoints import Tensors, edit_checkpoint
from support.checkpoints import load as load_tensors
from support.exports import OTHER_TOOLS
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import CompressedTensorsLinearMethod
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_int8 as ct_moe,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import CompressedTensorsW8A8Int8
from vllm.model_executor.layers.quantization.quark.quark import QuarkLinearMethod
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkW8A8Int8MoEMethod
from vllm.model_executor.layers.quantization.quark.schemes import QuarkW8A8Int8

import quarkconv

EXPORTS = (
    "qwen3_moe-quark0.13-f2f",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
    "mixtral-quark0.11-eager",
    "minimax_m2-quark0.13-f2f",
    "deepseek_v3-quark0.13-f2f",
    "deepseek_v3-0.13-f2f-mtp",
    "step3p5-like-3key_fused",
    "glm4_moe-0.13-f2f-experts_only",
    "glm4_moe-0.13-f2f-mtp_bf16",
    "qwen2_moe-0.11-eager-shared_expert",
    "qwen3_5_moe-0.13-f2f-language_model",
    "qwen3_moe-0.11-eager-layer_type",
    "qwen3_moe-0.11-eager-sharded",
    "qwen3_moe-0.11-f2f",
    "qwen3_moe-0.13-f2f-attention_per_tensor",
    "qwen3_moe-0.13-f2f-exclude_patterns_on_disk",
    "qwen3_moe-0.13-f2f-experts_per_projection",
    "qwen3_moe-0.13-f2f-layer_excluded",
    "qwen3_moe-0.13-f2f-re_given_to_quark",
    "qwen3_moe-quark0.11-eager-int8_static",
    "qwen3_moe-0.11-eager-kv_cache_fp8",
)
"""Every export that can be converted and that vLLM has a model class for."""

FORMS = (QUARK, "fused-int8", "compressed-tensors", "quark", "bf16")

FAILS = {
    ("deepseek_v3-quark0.13-f2f", "fused-int8"): (KeyError, "layers.1.mlp.experts.down_proj"),
    ("deepseek_v3-0.13-f2f-mtp", "fused-int8"): (KeyError, "layers.1.mlp.experts.down_proj"),
    ("qwen3_moe-0.11-eager-layer_type", QUARK): (RuntimeError, "is invalid for input of size 64"),
    ("qwen3_moe-quark0.11-eager-int8_static", "fused-int8"): (RuntimeError, "Unsupported FusedMoe scheme"),
    ("qwen3_moe-quark0.11-eager-int8_static", "compressed-tensors"): (RuntimeError, "Unsupported FusedMoe scheme"),
}
"""What vLLM refuses, and how: classes that take experts one by one only; settings by layer type, which it ignores."""

WRONG = {
    ("step3p5-like-3key_fused", "fused-int8"): r".+\.moe\.experts\.routed_experts\.(w13|w2)_weight(_scale)?",
    ("qwen3_moe-0.13-f2f-exclude_patterns_on_disk", QUARK): r".+\.(mlp\.gate|layers\.2\..+)\.weight(_scale)?",
}
"""What vLLM takes without an error and loads wrongly, and which parameters: experts that the class skips; modules
excluded by fnmatch patterns, which vLLM reads as names."""

STATIC = {"qwen3_moe-quark0.11-eager-int8_static"}
"""Exports with static activation scales."""

KV_CACHE = {"qwen3_moe-0.11-eager-kv_cache_fp8"}
"""Exports with a quantized key-value cache."""

COMPRESSED_TENSORS = ("fused-int8", "compressed-tensors")
"""Forms whose config is that of compressed-tensors."""

NOT_STORED = re.compile(r".+\.attn\.((k|v|q|prob)_scale|(k|v|q)_zero_point)|.+_zero_point")
"""Parameters that checkpoints need not have: scales of a key-value cache in BF16, zero points that are zero."""

PADDED = ("input_mix_weight_down_block_inject.weight", ".attn.attn_sink")
"""Ends of the names of parameters with rows that no checkpoint has and no layer reads."""

FLOAT_ONLY = re.compile(r"(.+\.)?(visual|linear_attn)\..+")
"""Parts that Quark leaves in float and that ranks share out by rules of their own."""


def mismatches(model: torch.nn.Module, stacked: Stacked, rank: Rank, form: str) -> list[str]:
    """Names of the parameters that do not hold what they must, bit for bit."""
    wrong = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta or stacked.left_out(name):  # of an image encoder
            continue
        if NOT_STORED.fullmatch(name) or (rank.size > 1 and FLOAT_ONLY.fullmatch(name)):
            continue
        try:
            expected = (
                stacked.input_scale(name, rank)
                if name.endswith("input_scale")
                else stacked.parameter(name, rank, dequantized=form == "bf16")
            )
        except KeyError:  # vLLM has a scale for what is stored without
            wrong.append(name)
            continue
        if form in (QUARK, "quark") and name.endswith("weight_scale"):
            if expected.numel() != parameter.numel():
                expected = stacked.scale_of_parts(name, rank)
            expected = expected.reshape(parameter.shape)  # there a scale of a row has no second axis
        if expected.is_floating_point() and not name.endswith("_scale"):
            expected = expected.to(parameter.dtype)  # routers and biases in F32
        found = parameter.data[: len(expected)] if name.endswith(PADDED) else parameter.data
        same = expected.dtype == parameter.dtype and torch.equal(expected, found)
        if not same:
            wrong.append(name)
    return wrong


def cases() -> list[tuple[str, str]]:
    """(export, form) of everything that loads."""
    return [(name, form) for name in EXPORTS for form in FORMS if (name, form) not in {*FAILS, *WRONG}]


@pytest.mark.parametrize(("name", "form"), cases())
def test_every_parameter_is_what_stacking_gives(forms: Forms, name: str, form: str) -> None:
    for rank in RANKS:
        model = load(build(forms(name, form), rank), rank)
        assert not mismatches(model, forms.stacked(name), rank, form), rank
        if form != "bf16":
            routed = [value for key, value in model.named_parameters() if key.endswith("w13_weight")]
            assert any(value.dtype == torch.int8 for value in routed)


@pytest.mark.parametrize("form", [QUARK, *COMPRESSED_TENSORS])
@pytest.mark.parametrize("name", [name for name in OTHER_TOOLS if "msmodelslim" not in name])
def test_exports_of_other_tools_load(forms: Forms, name: str, form: str) -> None:
    """As they are, which is compressed-tensors, and converted."""
    model = load(build(forms(name, form)))
    assert not mismatches(model, forms.stacked(name), WHOLE, "compressed-tensors")


@pytest.mark.parametrize("target", [form for form in FORMS if form != QUARK])
def test_experts_that_do_not_divide_by_the_ranks(forms: Forms, tmp_path: Path, target: str) -> None:
    """The first ranks have one more."""
    source = tmp_path / "source"
    shutil.copytree(forms.source("qwen3_moe-quark0.13-f2f"), source)

    def drop(tensors: Tensors) -> None:
        for name in list(tensors):
            if ".experts.7." in name:
                del tensors[name]
            elif name.endswith(".mlp.gate.weight"):
                tensors[name] = tensors[name][:7].clone()

    edit_checkpoint(source, drop)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"num_local_experts": 7}))
    folder = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=1).output
    for rank, experts in (Rank(2, 0, True), 4), (Rank(2, 1, True), 3):
        model = load(build(folder, rank), rank)
        assert not mismatches(model, Stacked(source), rank, target)
        assert len(model.get_parameter("model.layers.0.mlp.experts.routed_experts.w2_weight")) == experts


@pytest.mark.parametrize(("name", "form"), [case for case in cases() if case[1] != "bf16"])
def test_int8_is_computed_where_int8_is_stored(forms: Forms, name: str, form: str) -> None:
    stacked, seen = forms.stacked(name), {True: 0, False: 0}
    for module_name, module in build(forms(name, form)).named_modules():
        method = getattr(module, "quant_method", None)
        weights = {"weight", "w13_weight"}.intersection(dict(module.named_parameters(recurse=False)))
        if method is None or not weights or FLOAT_ONLY.fullmatch(module_name):
            continue
        int8 = stacked.is_int8(module_name)
        seen[int8] += 1
        if not int8:
            assert type(method).__name__.startswith("Unquantized"), module_name
        elif form in (QUARK, "quark"):
            assert isinstance(method, QuarkLinearMethod | QuarkW8A8Int8MoEMethod), module_name
            if isinstance(method, QuarkLinearMethod):
                assert isinstance(module.scheme, QuarkW8A8Int8)
                assert module.scheme.is_static_input_scheme == (name in STATIC)
            else:
                assert method.static_input_scales == (name in STATIC)
        elif isinstance(method, CompressedTensorsLinearMethod):
            assert isinstance(module.scheme, CompressedTensorsW8A8Int8)
            assert (module.scheme.strategy, module.scheme.input_symmetric) == ("channel", True)
            assert not module.scheme.is_static_input_scheme
        else:
            assert isinstance(method, ct_moe.CompressedTensorsW8A8Int8MoEMethod), module_name
            assert method.int8_backend.value == "TRITON"
    assert all(seen.values())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KV_CACHE)
def test_scales_of_the_key_value_cache_arrive(forms: Forms, name: str, form: str) -> None:
    model = load(build(forms(name, form)))
    source = load_tensors(forms.source(name))
    for layer in range(2):
        attention = model.get_submodule(f"model.layers.{layer}.self_attn.attn")
        assert attention.kv_cache_dtype == ("fp8" if form in COMPRESSED_TENSORS else "auto")
        for part in "kv" if form != "bf16" else "":
            expected = source[f"model.layers.{layer}.self_attn.{part}_proj.output_scale"]
            assert getattr(attention, f"{part}_scale").item() == expected.item()


@pytest.mark.parametrize(("name", "form"), FAILS)
def test_what_vllm_refuses(forms: Forms, name: str, form: str) -> None:
    error, message = FAILS[name, form]
    with pytest.raises(error, match=message):
        load(build(forms(name, form)))


@pytest.mark.parametrize(("name", "form"), WRONG)
def test_what_vllm_loads_wrongly_without_an_error(forms: Forms, name: str, form: str) -> None:
    """Should this fail because nothing is wrong any more, ``inspection/engines.toml`` has a row to change."""
    wrong = mismatches(load(build(forms(name, form))), forms.stacked(name), WHOLE, form)
    assert wrong
    assert [parameter for parameter in wrong if not re.fullmatch(WRONG[name, form], parameter)] == []


def _renamed(old: str, new: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        for name in [name for name in tensors if re.search(old, name)]:
            tensors[re.sub(old, new, name)] = tensors.pop(name)

    return change


def _flat_scales(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith(("gate_up_proj_scale", "down_proj_scale"))]:
        tensors[name] = tensors[name].squeeze(-1).clone()


def _halves_swapped(tensors: Tensors) -> None:
    for name in [name for name in tensors if name.endswith("gate_up_proj")]:
        tensors[name] = torch.cat(tensors[name].chunk(2, 1)[::-1], 1)


SPELLINGS: dict[str, tuple[Callable[[Tensors], None], type[Exception] | None]] = {
    "names of the engine's parameters": (_renamed(r"experts\.gate_up_proj$", "experts.w13_weight"), None),
    "names of the other family": (_renamed(r"experts\.gate_up_proj((_scale)?)$", r"experts.w13\1"), None),
    "names of a linear": (_renamed(r"(experts\.(gate_up|down)_proj)$", r"\1.weight"), AttributeError),
    "scales of a linear": (_renamed(r"(experts\.(gate_up|down)_proj)_scale$", r"\1_weight_scale"), AttributeError),
    "scales without the last axis": (_flat_scales, RuntimeError),
    "up before gate": (_halves_swapped, None),
}
"""Wrong spellings, and the error of vLLM; None where it accepts them silently."""


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_wrong_spelling_is_found(forms: Forms, tmp_path: Path, spelling: str) -> None:
    """By vLLM, or by the comparison above where vLLM accepts it silently."""
    name = "qwen3_moe-quark0.13-f2f"
    folder = tmp_path / name
    shutil.copytree(forms(name, "fused-int8"), folder)
    assert not mismatches(load(build(folder)), forms.stacked(name), WHOLE, "fused-int8")
    change, error = SPELLINGS[spelling]
    edit_checkpoint(folder, change)
    with pytest.raises(error) if error else nullcontext():
        assert mismatches(load(build(folder)), forms.stacked(name), WHOLE, "fused-int8")
