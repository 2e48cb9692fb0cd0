"""SGLang's own loader on an export of each family that it has a class for and that it builds without a GPU.

``checked_model_types`` of ``inspection/engines.toml`` lists the families of this file.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Final
from unittest.mock import patch

import pytest
import torch
from engines.expected import RANKS, WHOLE
from engines.families import Family, copy, ernie_mismatches, experts_that_differ, model_type
from engines.sglang.exports import prepare
from engines.sglang.loading import build, load
from engines.sglang.test_loading import FORMS, mismatches
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8MoEMethod
from sglang.srt.models import deepseek
from support.exports import DATA, restore

import quarkconv
from quarkconv.inspection.engine_facts import checked_classes, checked_model_types

LOADED: Final = (
    "bailing_hybrid", "bailing_hybrid_v2.5", "bailing_moe", "bailing_moe_v2", "bailing_moe_v3_vl", "deepseek_v2",
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "ernie4_5_moe", "gemma4", "glm4_moe", "glm4_moe_lite", "glm5_next",
    "glm_moe_dsa", "grok-2", "hunyuan_v1_moe", "kimi_k2", "kimi_k25", "kimi_k3", "kimi_linear", "lfm2_moe",
    "longcat_flash", "mimo_v2_flash", "minimax_m2", "minimax_m3_vl", "mixtral", "olmoe", "phimoe", "qwen2_moe",
    "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe", "qwen4_exp_vl",
)  # fmt: skip
TARGETS: Final = [target for target in FORMS if target != "bf16"]


def loaded(family: str, target: str, folder: Path, flow: str = "f2f") -> tuple[torch.nn.Module, list[str]]:
    """The model, and the names of the parameters that do not hold what they must."""
    source = prepare(copy(family, folder / "source", flow))
    out = quarkconv.convert_checkpoint(source, target, folder / "out", jobs=1).output
    model = load(build(out, WHOLE, FORMS[target]), out)
    return model, mismatches(model, Family(source, "sglang"), WHOLE, target)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", LOADED)
def test_every_parameter_is_what_stacking_gives(tmp_path: Path, family: str, target: str) -> None:
    model, wrong = loaded(family, target, tmp_path)
    assert wrong == []
    routed = [module for module in model.modules() if hasattr(module, "w13_weight")]
    assert routed
    assert all(isinstance(module.quant_method, W8A8Int8MoEMethod) for module in routed)


@pytest.mark.parametrize("family", LOADED)
def test_ranks_keep_their_part_of_the_experts(tmp_path: Path, family: str) -> None:
    source = prepare(copy(family, tmp_path / "source"))
    out = quarkconv.convert_checkpoint(source, "w8a8-int8", tmp_path / "out", jobs=1).output
    expected = Family(source, "sglang")
    for rank in RANKS[1:]:
        model = load(build(out, rank), out)
        assert experts_that_differ(model, expected, rank) == [], rank


WRONG: Final = {
    "llama4": r"model\.layers\.0\.feed_forward\.experts\.(w13|w2)_weight(_scale)?",
    "nemotron_h": r"model\.layers\.1\.mixer\.experts\.w13_weight(_scale)?",
}
"""Families of which SGLang skips the experts; of which it keeps rows for a gate that they do not have."""


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", WRONG)
def test_experts_that_sglang_loads_wrongly_without_an_error(tmp_path: Path, family: str, target: str) -> None:
    _, wrong = loaded(family, target, tmp_path)
    assert wrong
    assert all(re.fullmatch(WRONG[family], parameter) for parameter in wrong)


@pytest.mark.parametrize("target", TARGETS)
def test_experts_of_gpt_oss_one_by_one_are_skipped_silently(tmp_path: Path, target: str) -> None:
    source = prepare(copy("gpt_oss", tmp_path / "source", "eager"))
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=1).output
    experts = load(build(out, WHOLE, FORMS[target]), out).get_submodule("model.layers.0.mlp.experts")
    assert (experts.get_parameter("w13_weight") == -128).all()  # the poison: nothing was loaded
    assert (experts.get_parameter("w2_weight") == -128).all()


@pytest.mark.parametrize("target", TARGETS)
def test_experts_of_deepseek_are_computed_without_their_scales(tmp_path: Path, target: str) -> None:
    """Its class gives the codes to the kernel for BF16, whose product Triton refuses to compile: "same dtype"."""
    source = prepare(copy("deepseek", tmp_path / "source"))
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=1).output
    moe = load(build(out, WHOLE, FORMS[target]), out).get_submodule("model.layers.0.mlp")
    vars(moe)["config"].n_shared_experts = None
    with (
        patch.object(deepseek, "fused_moe", side_effect=lambda x, **_: x) as kernel,
        patch.object(deepseek, "tensor_model_parallel_all_reduce", lambda x: x),
    ):
        moe(torch.ones(1, 16).bfloat16())
    (x,), arguments = kernel.call_args
    assert (x.dtype, arguments["w1"].dtype, arguments["w2"].dtype) == (torch.bfloat16, torch.int8, torch.int8)
    assert set(arguments) == {"w1", "w2", "topk_output", "moe_runner_config"}


@pytest.mark.parametrize("target", TARGETS)
def test_experts_for_text_and_for_images_are_as_stored(tmp_path: Path, target: str) -> None:
    source = prepare(copy("ernie4_5_moe_vl", tmp_path / "source"))
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=1).output
    assert ernie_mismatches(load(build(out, WHOLE, FORMS[target]), out), source) == []


REFUSED: Final = {
    "dbrx": (KeyError, r"ffn\.experts\.mlp\.0\.v1\.weight"),
    "granitemoehybrid": (AttributeError, "'W8A8Int8Config' object has no attribute 'get_cache_scale'"),
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", REFUSED)
def test_families_that_sglang_refuses(tmp_path: Path, family: str, target: str) -> None:
    error, message = REFUSED[family]
    with pytest.raises(error, match=message):
        loaded(family, target, tmp_path, "eager")


def test_longcat_needs_rope_scaling_in_its_config(tmp_path: Path) -> None:
    """Without it its config has no frequencies, so that the published config fails too."""
    source = prepare(copy("longcat_flash", tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    del config["rope_scaling"]
    (source / "config.json").write_text(json.dumps(config))
    out = quarkconv.convert_checkpoint(source, "w8a8-int8", tmp_path / "out", jobs=1).output
    with pytest.raises(TypeError, match="'NoneType' is not iterable"):
        build(out)


@pytest.mark.parametrize("target", FORMS)
def test_a_whole_model_loads_with_its_image_encoder(tmp_path: Path, target: str) -> None:
    export = DATA / "exports" / "qwen3_5_moe-0.13-f2f-language_model"
    source = prepare(restore(export, tmp_path / "source"))
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=1).output
    model = load(build(out, WHOLE, FORMS[target]), out)
    assert any(name.startswith("visual.blocks.0.") for name, _ in model.named_parameters())
    assert mismatches(model, Family(source, "sglang"), WHOLE, target) == []


def test_verdicts_are_given_for_what_was_loaded() -> None:
    assert checked_model_types()["sglang"] == {*map(model_type, LOADED), "ernie4_5_moe_vl", "step3p5"}


@pytest.mark.parametrize("family", [*LOADED, "ernie4_5_moe_vl"])
def test_verdicts_are_given_for_the_class_that_was_loaded(tmp_path: Path, family: str) -> None:
    config = json.loads((prepare(copy(family, tmp_path / "source")) / "config.json").read_text())
    assert set(config["architectures"]) <= checked_classes()["sglang"][config["model_type"]]
