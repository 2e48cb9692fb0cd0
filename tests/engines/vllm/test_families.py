"""vLLM's own loader on an export of each family that it has a class for and that it builds without a GPU.

``checked_model_types`` of ``inspection/engines.toml`` lists the families of this file and of ``test_loading``.
"""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Final

import pytest
import torch
from engines.expected import RANKS, WHOLE
from engines.families import Family, copy, ernie_mismatches, experts_that_differ, model_type
from engines.forms import QUARK
from engines.vllm.exports import prepare
from engines.vllm.loading import build, load
from engines.vllm.test_loading import FORMS, mismatches
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_int8 as ct_moe,
)
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkW8A8Int8MoEMethod

import quarkconv
from quarkconv.inspection.engine_facts import checked_classes, checked_model_types

LOADED: Final = (
    "bailing_hybrid", "bailing_hybrid_v2.5", "bailing_moe", "bailing_moe_v2", "bailing_moe_v3_vl", "deepseek",
    "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "deepseek_vl_v2", "ernie4_5_moe", "gemma4",
    "glm4_moe", "glm4_moe_lite", "glm5_next", "glm_moe_dsa", "hunyuan_v1_moe", "jamba", "kimi_k2", "kimi_k25",
    "kimi_k3", "kimi_linear", "lfm2_moe", "llama4", "longcat_flash", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl",
    "mixtral", "nemotron_h", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe",
    "qwen4_exp",
)  # fmt: skip
ONE_BY_ONE: Final = (KeyError, r"layers\.0\..+\.experts\.(down_proj|w13|w2)")
TRANSPOSED: Final = (RuntimeError, "must match the size of tensor")
FUSED_REFUSED: Final = {
    **dict.fromkeys(
        ("deepseek", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_vl_v2", "glm4_moe_lite", "glm5_next",
         "glm_moe_dsa", "kimi_k2", "kimi_k25", "kimi_k3", "kimi_linear", "longcat_flash"), ONE_BY_ONE
    ),
    "deepseek_v4": (UnboundLocalError, "name_mapped"),
    **dict.fromkeys(("aria", "llama4", "qwen3_vl_moe"), TRANSPOSED),
}  # fmt: skip
"""Families whose class takes experts one by one only, or fused ones as [E, in, out] only; and the error."""
FUSED_SKIPPED: Final = (
    "bailing_hybrid", "bailing_hybrid_v2.5", "bailing_moe_v3_vl", "mimo_v2_flash", "minimax_m3_vl",
)  # fmt: skip
"""Families whose class skips fused experts without an error."""
NOT_FUSED: Final = ("nemotron_h",)
"""Families without a gate, which cannot be converted to fused-int8."""
EXPORTED_WRONG: Final = {
    "deepseek_vl_v2": r"language_model\..+\.self_attn\..+\.weight_scale",
    "minimax_m3_vl": r"vision_tower\..+\.fc[12]\.weight_scale",
    "qwen3_vl_moe": r"language_model\..+\.mlp\.gate\.weight_scale",
}
"""Families of which vLLM takes float linears of the export for int8: it looks them up under another name than the
config has, or reads patterns as names."""
INT8_FORMS: Final = [form for form in FORMS if form != "bf16"]
_ELSEWHERE: Final = {
    *((family, "fused-int8") for family in (*FUSED_REFUSED, *FUSED_SKIPPED, *NOT_FUSED)),
    *((family, QUARK) for family in EXPORTED_WRONG),
}


def converted(name: str, form: str, folder: Path, flow: str = "f2f") -> tuple[Path, Path]:
    """The export of a family, and its conversion; the export itself for the form "as exported"."""
    source = prepare(copy(name, folder / "source", flow))
    if form == QUARK:
        return source, source
    return source, quarkconv.convert_checkpoint(source, form, folder / "out", jobs=1).output


@pytest.mark.parametrize(("family", "form"), [pair for pair in product(LOADED, INT8_FORMS) if pair not in _ELSEWHERE])
def test_every_parameter_is_what_stacking_gives(tmp_path: Path, family: str, form: str) -> None:
    source, folder = converted(family, form, tmp_path)
    model = load(build(folder))
    assert mismatches(model, Family(source, "vllm"), WHOLE, form) == []
    method = QuarkW8A8Int8MoEMethod if form in (QUARK, "quark") else ct_moe.CompressedTensorsW8A8Int8MoEMethod
    routed = [module for module in model.modules() if hasattr(module, "w13_weight")]
    assert routed
    assert all(isinstance(module.quant_method, method) for module in routed)


@pytest.mark.parametrize("family", LOADED)
def test_ranks_keep_their_part_of_the_experts(tmp_path: Path, family: str) -> None:
    source, folder = converted(family, "compressed-tensors", tmp_path)
    expected = Family(source, "vllm")
    for rank in RANKS[1:]:
        model = load(build(folder, rank), rank)
        assert experts_that_differ(model, expected, rank) == [], rank


@pytest.mark.parametrize("family", FUSED_REFUSED)
def test_fused_experts_that_vllm_refuses(tmp_path: Path, family: str) -> None:
    error, message = FUSED_REFUSED[family]
    _, folder = converted(family, "fused-int8", tmp_path, "eager" if family == "aria" else "f2f")
    with pytest.raises(error, match=message):
        load(build(folder))


@pytest.mark.parametrize("family", FUSED_SKIPPED)
def test_fused_experts_that_vllm_skips_silently(tmp_path: Path, family: str) -> None:
    source, folder = converted(family, "fused-int8", tmp_path)
    wrong = mismatches(load(build(folder)), Family(source, "vllm"), WHOLE, "fused-int8")
    assert len(wrong) == 4
    assert all(re.search(r"\.routed_experts\.(w13|w2)_weight(_scale)?$", parameter) for parameter in wrong)


@pytest.mark.parametrize("family", EXPORTED_WRONG)
def test_float_linears_of_exports_that_vllm_takes_for_int8(tmp_path: Path, family: str) -> None:
    source, folder = converted(family, QUARK, tmp_path)
    wrong = mismatches(load(build(folder)), Family(source, "vllm"), WHOLE, QUARK)
    assert wrong
    assert all(re.fullmatch(EXPORTED_WRONG[family], parameter) for parameter in wrong)


@pytest.mark.parametrize("form", [form for form in INT8_FORMS if form != "fused-int8"])
def test_experts_for_text_and_for_images_are_as_stored(tmp_path: Path, form: str) -> None:
    source, folder = converted("ernie4_5_moe_vl", form, tmp_path)
    assert ernie_mismatches(load(build(folder)), source) == []


ARIA_WRONG: Final = r"language_model\.layers\.0\.mlp\.experts\.routed_experts\.w13_weight(_scale)?"


@pytest.mark.parametrize("form", [QUARK, "compressed-tensors", "quark"])
def test_gate_and_up_of_aria_are_loaded_wrongly(tmp_path: Path, form: str) -> None:
    """Its class takes them for parts of one linear. Its image encoder and projector are left out here."""
    source, folder = converted("aria", form, tmp_path, "eager")
    wrong = mismatches(load(build(folder)), Family(source, "vllm"), WHOLE, form)
    assert len(wrong) == 2
    assert all(re.fullmatch(ARIA_WRONG, parameter) for parameter in wrong)


REFUSED: Final = {
    "dbrx": (KeyError, r"ffn\.experts\.mlp\.0\.v1\.weight", KeyError, r"ffn\.experts\.mlp\.0\.v1\.weight"),
    "gpt_oss": (RuntimeError, "must match the size of tensor", RuntimeError, "doesn't match the broadcast shape"),
    "granitemoehybrid": (
        KeyError, r"block_sparse_moe\.router\.weight", KeyError, r"block_sparse_moe\.router\.weight"
    ),
}  # fmt: skip
"""Families whose class does not know the names of Quark's experts: how the export fails, and compressed-tensors."""


@pytest.mark.parametrize("form", [QUARK, "compressed-tensors"])
@pytest.mark.parametrize("family", REFUSED)
def test_experts_whose_names_vllm_does_not_know(tmp_path: Path, family: str, form: str) -> None:
    error, message = REFUSED[family][:2] if form == QUARK else REFUSED[family][2:]
    _, folder = converted(family, form, tmp_path, "eager")
    with pytest.raises(error, match=message):
        load(build(folder))


@pytest.mark.parametrize("form", INT8_FORMS)
def test_the_router_of_phimoe_is_zero(tmp_path: Path, form: str) -> None:
    """Its class calls ``block_sparse_moe.gate`` ``mlp.router``, under which no config excludes it from INT8."""
    _, folder = converted("phimoe", form, tmp_path)
    router = dict(load(build(folder)).get_submodule("model.layers.0.mlp.router").named_parameters())
    assert router["weight"].dtype == torch.int8
    assert not router["weight"].any()
    assert router["weight_scale"].isnan().all()  # the poison: nothing was loaded


def test_verdicts_are_given_for_what_was_loaded() -> None:
    assert checked_model_types()["vllm"] == {*map(model_type, LOADED), "ernie4_5_moe_vl", "step3p5"}
    # step3p5: test_loading


@pytest.mark.parametrize("family", [*LOADED, "ernie4_5_moe_vl"])
def test_verdicts_are_given_for_the_class_that_was_loaded(tmp_path: Path, family: str) -> None:
    config = json.loads((prepare(copy(family, tmp_path / "source")) / "config.json").read_text())
    assert set(config["architectures"]) <= checked_classes()["vllm"][config["model_type"]]
