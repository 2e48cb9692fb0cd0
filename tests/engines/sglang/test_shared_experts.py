"""Where SGLang computes the shared expert as the last of the routed ones, which it does on GPUs for some models.

Nothing there asks whether both have the same dtype: a shared expert that a checkpoint keeps in float is copied into a
slot for int8 codes, and the scales of the slot stay as they were made.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from engines.expected import WHOLE
from engines.families import Family, copy
from engines.sglang.exports import prepare
from engines.sglang.loading import build, load
from engines.sglang.test_loading import FORMS, mismatches
from support.checkpoints import Tensors, edit_checkpoint
from support.checkpoints import load as tensors_of

import quarkconv
from quarkconv.inspection.engine_facts import engine_facts

FUSED: Final = (
    "bailing_hybrid", "bailing_moe_v3_vl", "deepseek_v3", "glm4_moe", "glm4_moe_lite", "glm5_next", "glm_moe_dsa",
)  # fmt: skip
TARGETS: Final = [target for target in FORMS if target != "bf16"]
OF_256: Final = ("deepseek_v3", "glm_moe_dsa")
"""Families of which SGLang fuses the shared expert with 256 routed ones only, the number of the published models."""
_ROUTED: Final = re.compile(r"(.+\.experts)\.(\d+)\.(.+)")
_SHARED: Final = re.compile(r"(.+\.shared_experts\.\w+)\.weight_scale")


def export(family: str, folder: Path, *, shared_in_float: bool) -> Path:
    """The export of a family whose shared experts are in int8, or in float."""
    source = prepare(copy(family, folder))
    if family in OF_256:
        edit_checkpoint(source, _repeat_experts)
    path = source / "config.json"
    config = json.loads(path.read_text())
    if family in OF_256:
        config["n_routed_experts"] = 256
    left: list[str] = []
    edit_checkpoint(source, lambda tensors: left.extend(_convert_shared(tensors, shared_in_float)))
    excluded = config["quantization_config"]["exclude"]
    shared = [name for name in excluded if "shared_experts" in name]
    config["quantization_config"]["exclude"] = [*(name for name in excluded if name not in shared), *left]
    path.write_text(json.dumps(config))
    return source


def _repeat_experts(tensors: Tensors) -> None:
    """256 experts, each a copy of one of those there are, and as many rows of the router."""
    routed = {name: match for name in tensors if (match := _ROUTED.fullmatch(name))}
    count = 1 + max(int(match[2]) for match in routed.values())
    for match in routed.values():
        for expert in range(int(match[2]), 256, count):
            tensors[f"{match[1]}.{expert}.{match[3]}"] = tensors[match[0]].clone()
    for name in [name for name in tensors if ".mlp.gate." in name]:
        tensors[name] = torch.cat([tensors[name]] * (256 // count))


def _convert_shared(tensors: Tensors, to_float: bool) -> list[str]:
    """Turn linears of shared experts into float, or into int8; returns those that are float."""
    linears = [name.removesuffix(".weight") for name in tensors if re.search(r"\.shared_experts\.\w+\.weight$", name)]
    for name in linears:
        weight = tensors[f"{name}.weight"]
        if to_float and weight.dtype == torch.int8:
            scale = tensors.pop(f"{name}.weight_scale").reshape(-1, 1)
            tensors[f"{name}.weight"] = (weight.float() * scale).bfloat16()
        elif not to_float and weight.dtype != torch.int8:
            scale = weight.float().abs().amax(1) / 127
            tensors[f"{name}.weight"] = (weight.float() / scale[:, None]).round().to(torch.int8)
            tensors[f"{name}.weight_scale"] = scale
    return linears if to_float else []


def slots(model: torch.nn.Module) -> list[Any]:
    """The layers of routed experts."""
    found = [module for module in model.modules() if hasattr(module, "w13_weight")]
    assert found
    return found


def shared_of(source: Path, leaf: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gate and up, and down, of the shared expert of the only layer."""
    tensors = tensors_of(source)
    [prefix] = {name.rpartition(".shared_experts.")[0] for name in tensors if ".shared_experts." in name}
    gate, up, down = (tensors[f"{prefix}.shared_experts.{part}_proj.{leaf}"] for part in ("gate", "up", "down"))
    return torch.cat([gate, up]), down


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FUSED)
def test_a_shared_expert_in_int8_is_the_last_of_the_routed_ones(tmp_path: Path, family: str, target: str) -> None:
    source = export(family, tmp_path / "source", shared_in_float=False)
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=1).output
    for layer in slots(load(build(out, WHOLE, FORMS[target], gpu=True), out)):
        for leaf in ("weight", "weight_scale"):
            for half, expected in zip(("w13", "w2"), shared_of(source, leaf), strict=True):
                held = layer.get_parameter(f"{half}_{leaf}")[-1]
                assert torch.equal(held, expected.reshape(held.shape)), (half, leaf)


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FUSED)
def test_a_shared_expert_in_float_is_taken_for_int8_without_an_error(tmp_path: Path, family: str, target: str) -> None:
    source = export(family, tmp_path / "source", shared_in_float=True)
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=1).output
    for layer in slots(load(build(out, WHOLE, FORMS[target], gpu=True), out)):
        for half, values in zip(("w13", "w2"), shared_of(source, "weight"), strict=True):
            assert torch.equal(layer.get_parameter(f"{half}_weight")[-1], values.to(torch.int8))
            assert layer.get_parameter(f"{half}_weight_scale")[-1].isnan().all()  # the poison: nothing was loaded


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("family", FUSED)
def test_a_shared_expert_in_float_is_as_stored_where_it_is_not_fused(tmp_path: Path, family: str, target: str) -> None:
    source = export(family, tmp_path / "source", shared_in_float=True)
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out", jobs=1).output
    model = load(build(out, WHOLE, FORMS[target], gpu=True, disable_shared_experts_fusion=True), out)
    assert mismatches(model, Family(source, "sglang"), WHOLE, target) == []


def test_rows_name_the_model_types_that_are_fused() -> None:
    rows = [row for row in engine_facts() if row.engine == "sglang" and "float-shared-experts" in row.having]
    wrong = {row.form: row.model_types for row in rows if row.verdict == "wrong"}
    assert wrong == dict.fromkeys(TARGETS, FUSED)
