"""vLLM's own loader on an export of each family that it has a class for and that it builds without a GPU.

``checked_model_types`` of ``inspection/engines.toml`` lists the families of this file and of ``test_loading``.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Final

import pytest
import torch
from engines.expected import WHOLE
from engines.families import Family, copy
from engines.vllm.conftest import QUARK
from engines.vllm.exports import prepare
from engines.vllm.loading import build, load
from engines.vllm.test_loading import FORMS, mismatches
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors_moe import (
    compressed_tensors_moe_w8a8_int8 as ct_moe,
)
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkW8A8Int8MoEMethod

import quarkconv
from quarkconv.inspection.engines import checked_model_types

LOADED: Final = (
    "deepseek_v2", "deepseek_v3", "ernie4_5_moe", "gemma4", "glm4_moe", "glm4_moe_lite", "hunyuan_v1_moe", "jamba",
    "lfm2_moe", "minimax_m2", "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next",
)  # fmt: skip
ONE_BY_ONE: Final = ("deepseek_v2", "deepseek_v3", "glm4_moe_lite")
"""Families whose class takes experts one by one only."""
INT8_FORMS: Final = [form for form in FORMS if form != "bf16"]


def converted(name: str, form: str, folder: Path) -> tuple[Path, Path]:
    """The export of a family, and its conversion; the export itself for the form "as exported"."""
    source = prepare(copy(name, folder / "source"))
    if form == QUARK:
        return source, source
    return source, quarkconv.convert_checkpoint(source, form, folder / "out", jobs=1).output


@pytest.mark.parametrize(
    ("family", "form"),
    [pair for pair in product(LOADED, INT8_FORMS) if pair not in [(family, "fused-int8") for family in ONE_BY_ONE]],
)
def test_every_parameter_is_what_stacking_gives(tmp_path: Path, family: str, form: str) -> None:
    source, folder = converted(f"{family}-0.13-f2f", form, tmp_path)
    model = load(build(folder))
    assert mismatches(model, Family(source, flat_bias=True), WHOLE, form) == []
    method = QuarkW8A8Int8MoEMethod if form in (QUARK, "quark") else ct_moe.CompressedTensorsW8A8Int8MoEMethod
    routed = [module for module in model.modules() if hasattr(module, "w13_weight")]
    assert routed
    assert all(isinstance(module.quant_method, method) for module in routed)


@pytest.mark.parametrize("family", ONE_BY_ONE)
def test_what_vllm_refuses(tmp_path: Path, family: str) -> None:
    _, folder = converted(f"{family}-0.13-f2f", "fused-int8", tmp_path)
    with pytest.raises(KeyError, match=r"layers\.0\.mlp\.experts\.down_proj"):
        load(build(folder))


@pytest.mark.parametrize("form", INT8_FORMS)
def test_the_router_of_phimoe_is_zero(tmp_path: Path, form: str) -> None:
    """Its class calls ``block_sparse_moe.gate`` ``mlp.router``, under which no config excludes it from INT8."""
    _, folder = converted("phimoe-0.13-f2f", form, tmp_path)
    router = dict(load(build(folder)).get_submodule("model.layers.0.mlp.router").named_parameters())
    assert router["weight"].dtype == torch.int8
    assert not router["weight"].any()
    assert router["weight_scale"].isnan().all()  # the poison: nothing was loaded


def test_verdicts_are_given_for_what_was_loaded() -> None:
    assert checked_model_types()["vllm"] == {*LOADED, "step3p5"}  # step3p5: test_loading
