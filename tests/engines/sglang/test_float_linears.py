"""Linears that SGLang alone keeps in float, exported in int8: `w8a8-int8` dequantizes them, other forms keep them.

SGLang's loader copies int8 codes into a parameter in BF16 without an error.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from engines.built import HIDDEN
from engines.expected import WHOLE
from engines.families import copy
from engines.sglang.exports import prepare
from engines.sglang.loading import build, load
from engines.sglang.test_loading import FORMS
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.quantization.w8a8_int8 import W8A8Int8LinearMethod
from support.checkpoints import Tensors, edit_checkpoint
from support.checkpoints import load as tensors_of
from support.exports import FIXTURES, restore
from support.model import int8_linear

import quarkconv


@dataclass(frozen=True)
class Case:
    """An export with more int8 linears.

    Attributes:
        export: name of a family, or of a fixture.
        linear: the linear that SGLang keeps in float.
        rows: its rows.
        columns: its columns.
        config: changes of config.json.
        beside: int8 linears that are added beside it, and that SGLang runs in int8: name -> rows.
        without: a linear beside it that is left out.
    """

    export: str
    linear: str
    rows: int
    columns: int = HIDDEN
    config: dict[str, Any] = field(default_factory=dict)
    beside: dict[str, int] = field(default_factory=dict)
    without: str = ""

    def write(self, folder: Path) -> Path:
        """Write the export; returns ``folder``."""
        fixture = self.export in FIXTURES
        source = prepare(restore(FIXTURES[self.export], folder) if fixture else copy(self.export, folder))
        parent = self.linear.rpartition(".")[0]
        rows = {self.linear: self.rows} | {f"{parent}.{name}": count for name, count in self.beside.items()}

        def change(tensors: Tensors) -> None:
            for module, count in rows.items():
                tensors.update(int8_linear(module, count, self.columns))
            for name in [name for name in tensors if self.without and name.startswith(f"{parent}.{self.without}.")]:
                del tensors[name]

        edit_checkpoint(source, change)
        config = json.loads((source / "config.json").read_text()) | self.config
        exclude = config["quantization_config"]["exclude"]
        exclude[:] = [name for name in exclude if name not in rows]
        (source / "config.json").write_text(json.dumps(config))
        return source


ATTENTION: Final = "model.layers.0.attention"
FUSED: Final = ("q_proj", "k_proj", "v_proj", "f_proj", "g_proj")
"""Linears of KimiDeltaAttention that SGLang merges into ``fused_qkvbfg_proj``, in int8."""
GRANULARITY: Final = "gated_attention_proj_granularity_type"
CASES: Final = {
    "step3p5": Case("step3p5-like-3key_fused", "model.layers.0.self_attn.g_proj", 4, 128),
    "gate of each head": Case("bailing_hybrid", f"{ATTENTION}.g_proj", 2, config={GRANULARITY: "head_wise"}),
    "gate of each element": Case("bailing_hybrid", f"{ATTENTION}.g_proj", 16, config={GRANULARITY: "element_wise"}),
    "beta": Case(
        "bailing_hybrid", f"{ATTENTION}.b_proj", 2,
        config={"layer_group_size": [1], "kda_safe_gate": False, "kda_lower_bound": None},
        beside=dict.fromkeys(FUSED, 8), without="kv_b_proj",
    ),
}  # fmt: skip


def loaded(case: Case, folder: Path, target: str) -> tuple[torch.nn.Module, Tensors]:
    """SGLang's model, and the tensors of the export."""
    source = case.write(folder / "source")
    out = quarkconv.convert_checkpoint(source, target, folder / "out", jobs=1).output
    model = load(build(out, WHOLE, FORMS[target]), out)
    module = model.get_submodule(case.linear)
    assert isinstance(module.quant_method, UnquantizedLinearMethod)
    assert [name for name, _ in module.named_parameters()] == ["weight"]
    return model, tensors_of(source)


@pytest.mark.parametrize("name", CASES)
def test_sglang_loads_code_times_scale_of_w8a8_int8(tmp_path: Path, name: str) -> None:
    linear = CASES[name].linear
    model, stored = loaded(CASES[name], tmp_path, "w8a8-int8")
    exact = stored[f"{linear}.weight"].double() * stored[f"{linear}.weight_scale"].double()[:, None]
    assert torch.equal(model.get_parameter(f"{linear}.weight").data, exact.float().bfloat16())


@pytest.mark.parametrize("name", CASES)
def test_sglang_takes_codes_as_weights_in_another_form(tmp_path: Path, name: str) -> None:
    linear = CASES[name].linear
    model, stored = loaded(CASES[name], tmp_path, "compressed-tensors")
    assert torch.equal(model.get_parameter(f"{linear}.weight").data, stored[f"{linear}.weight"].bfloat16())


def test_the_linears_that_sglang_merges_beside_it_stay_int8(tmp_path: Path) -> None:
    model, stored = loaded(CASES["beta"], tmp_path, "w8a8-int8")
    merged = model.get_submodule(f"{ATTENTION}.fused_qkvbfg_proj")
    assert isinstance(merged.quant_method, W8A8Int8LinearMethod)
    codes = torch.cat([stored[f"{ATTENTION}.{name}.weight"] for name in FUSED])
    assert torch.equal(merged.get_parameter("weight").data, codes)
