"""SGLang's own loader on an export of each family that it has a class for and that it builds without a GPU.

``checked_model_types`` of ``inspection/engines.toml`` lists the families of this file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
from engines.expected import WHOLE
from engines.families import Family, copy
from engines.sglang.loading import build, load, prepare
from engines.sglang.test_loading import FORMS, mismatches
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8MoEMethod

import quarkconv
from quarkconv.inspection.engines import checked_model_types

LOADED: Final = (
    "deepseek_v3", "ernie4_5_moe", "glm4_moe", "glm4_moe_lite", "lfm2_moe", "minimax_m2", "mixtral", "olmoe",
    "qwen2_moe", "qwen3_moe",
)  # fmt: skip


@pytest.mark.parametrize("target", [target for target in FORMS if target != "bf16"])
@pytest.mark.parametrize("family", LOADED)
def test_every_parameter_is_what_stacking_gives(tmp_path: Path, family: str, target: str) -> None:
    source = prepare(copy(family, tmp_path / "source"))
    folder = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=1).output
    model = load(build(folder, WHOLE, FORMS[target]), folder)
    assert mismatches(model, Family(source), WHOLE, target) == []
    routed = [module for module in model.modules() if hasattr(module, "w13_weight")]
    assert routed
    assert all(isinstance(module.quant_method, W8A8Int8MoEMethod) for module in routed)


def test_verdicts_are_given_for_what_was_loaded() -> None:
    assert checked_model_types()["sglang"] == set(LOADED)
