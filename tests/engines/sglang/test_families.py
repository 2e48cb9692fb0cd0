"""SGLang's own loader on an export of each family that it has a class for and that it builds without a GPU.

``checked_model_types`` of ``inspection/engines.toml`` lists the families of this file.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Final

import pytest
import torch
from engines.expected import WHOLE
from engines.families import Family, copy
from engines.sglang.loading import build, load, prepare
from engines.sglang.test_loading import FORMS, mismatches
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8MoEMethod

import quarkconv
from quarkconv.inspection.engines import checked_model_types

LOADED: Final = (
    "bailing_moe", "bailing_moe_v2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "ernie4_5_moe", "gemma4", "glm4_moe",
    "glm4_moe_lite", "glm_moe_dsa", "kimi_k2", "kimi_linear", "lfm2_moe", "mimo_v2_flash", "minimax_m2",
    "mixtral", "olmoe", "qwen2_moe", "qwen3_5_moe", "qwen3_moe", "qwen3_next", "qwen3_vl_moe",
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
def test_granitemoehybrid_is_refused(tmp_path: Path, target: str) -> None:
    with pytest.raises(AttributeError, match="'W8A8Int8Config' object has no attribute 'get_cache_scale'"):
        loaded("granitemoehybrid", target, tmp_path, "eager")


def test_verdicts_are_given_for_what_was_loaded() -> None:
    assert checked_model_types()["sglang"] == set(LOADED)
