"""Biases and activations of experts: carried into every target that loads them, and proven there."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import Tensors, load
from support.exports import DATA

import quarkconv
from quarkconv.description.description import describe
from quarkconv.experts.function import Unknown
from quarkconv.experts.knowledge import expert_routing
from quarkconv.targets import TARGETS

FAMILIES: Final = DATA / "families"
BIASED: Final = "gpt_oss-0.13-eager"
UNFUSED: Final = [name for name in TARGETS if name != "fused-int8"]
INT8: Final = [name for name in UNFUSED if name != "bf16"]
CLAMPED: Final = {
    BIASED: ("swiglu_limit", "swiglu_alpha"),
    "minimax_m3_vl-0.13-f2f": ("swiglu_limit", "swiglu_alpha"),
    "deepseek_v4-0.13-f2f": ("swiglu_limit",),
    "glm5_next-0.13-f2f": ("swiglu_limit",),
}
"""Export -> keys of its config that change what its experts compute."""


def biases(folder: Path) -> Tensors:
    return {name: tensor for name, tensor in load(folder).items() if ".experts." in name and name.endswith(".bias")}


def rewritten(folder: Path, name: str, value: torch.Tensor | None) -> None:
    """Replace a tensor, or remove it, and the manifest with it: then only numbers can tell."""
    shard = next(path for path in folder.glob("*.safetensors") if name in load_file(path))
    tensors = load_file(shard)
    tensors.pop(name)
    save_file(tensors if value is None else {**tensors, name: value}, shard, metadata={"format": "pt"})
    (folder / "quarkconv.json").unlink(missing_ok=True)
    index = folder / "model.safetensors.index.json"
    weight_map = json.loads(index.read_text())["weight_map"]
    if value is None:
        del weight_map[name]
    index.write_text(json.dumps({"weight_map": weight_map}))


def part(config: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = config.get("text_config", config)
    return found


@pytest.mark.parametrize("target", UNFUSED)
def test_every_bias_is_in_every_target(target: str, tmp_path: Path) -> None:
    out = quarkconv.convert_checkpoint(FAMILIES / BIASED, target, tmp_path / "out").output
    before, after = biases(FAMILIES / BIASED), biases(out)
    assert len(before) == 8
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert quarkconv.verify_checkpoint(out, FAMILIES / BIASED, device="cpu", tokens=8).problems == ()


@pytest.mark.parametrize("target", INT8)
@pytest.mark.parametrize("fault", ["changed", "exchanged", "missing"])
def test_a_bias_that_is_not_the_sources_is_found_in_every_target(target: str, fault: str, tmp_path: Path) -> None:
    out = quarkconv.convert_checkpoint(FAMILIES / BIASED, target, tmp_path / "out").output
    first, second = "model.layers.0.mlp.experts.1.down_proj.bias", "model.layers.0.mlp.experts.2.down_proj.bias"
    found = biases(out)
    if fault == "changed":
        rewritten(out, first, found[first] * 1.01 + 0.001)
    elif fault == "exchanged":
        rewritten(out, first, found[second])
        rewritten(out, second, found[first])
    else:
        rewritten(out, first, None)
    if fault == "missing":
        findings = quarkconv.inspect_checkpoint(out).findings
        assert "experts-not-understood" in {item.code for item in findings}
        return
    problems = quarkconv.verify_checkpoint(out, FAMILIES / BIASED, device="cpu", tokens=8).problems
    assert "bias differs" in problems[0].message


@pytest.mark.parametrize("target", UNFUSED)
def test_the_manifest_notices_a_bias_that_changed_without_the_source(target: str, tmp_path: Path) -> None:
    out = quarkconv.convert_checkpoint(FAMILIES / BIASED, target, tmp_path / "out").output
    manifest = (out / "quarkconv.json").read_bytes()
    name = "model.layers.0.mlp.experts.3.gate_up_proj.bias"
    rewritten(out, name, biases(out)[name] + 1)
    (out / "quarkconv.json").write_bytes(manifest)
    problems = quarkconv.verify_checkpoint(out, device="cpu", tokens=8).problems
    assert name in {problem.tensor for problem in problems}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("name", CLAMPED)
def test_what_experts_compute_is_the_sources_in_every_target(name: str, target: str, tmp_path: Path) -> None:
    if name == BIASED and target == "fused-int8":
        return  # refused: tests/verify/test_families.py
    source = json.loads((FAMILIES / name / "config.json").read_text())
    out = quarkconv.convert_checkpoint(FAMILIES / name, target, tmp_path / "out").output
    config = json.loads((out / "config.json").read_text())
    for key in CLAMPED[name]:
        assert part(config).get(key) == part(source).get(key)
    expected = quarkconv.verify_checkpoint(FAMILIES / name, device="cpu", tokens=8).numbers.layers[0].activation
    assert "clamped at" in expected
    if target != "bf16":
        layers = quarkconv.verify_checkpoint(out, FAMILIES / name, device="cpu", tokens=8).numbers.layers
        assert {item.activation for item in layers} == {expected}
        assert all(item.ok for item in layers)


@pytest.mark.parametrize("linear", [None, 1.25])
def test_experts_with_situ_are_computed(linear: float | None, tmp_path: Path) -> None:
    source = FAMILIES / "kimi_linear-0.13-f2f"
    config = json.loads((source / "config.json").read_text())
    config |= {"hidden_act": "situ", "activation_situ_beta": 2.0, "activation_situ_linear_beta": linear}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((source / "model.safetensors").read_bytes())
    result = quarkconv.verify_checkpoint(tmp_path, device="cpu", tokens=8)
    expected = "situ, beta 2" + ("" if linear is None else ", linear beta 1.25")
    assert {item.activation for item in result.numbers.layers} == {expected}
    assert result.ok
    assert result.numbers.skipped is None


QWEN: Final = "qwen3_moe-0.13-f2f"
MOE: Final = "model.layers.0.mlp"
STRANGE: Final = {
    "a bias of the logits": {f"{MOE}.gate.bias": torch.ones(4)},
    "a correction bias": {f"{MOE}.gate.e_score_correction_bias": torch.ones(4)},
    "a correction bias of the layer": {f"{MOE}.expert_bias": torch.ones(4)},
    "factors of experts": {f"{MOE}.router.per_expert_scale": torch.ones(4)},
    "experts by token id": {f"{MOE}.tid2eid": torch.zeros(64, 2, dtype=torch.int64)},
}
"""Tensors of routers of other families, beside one that chooses without them."""


def with_tensors(folder: Path, added: Tensors) -> Path:
    """The export of qwen3_moe with other tensors."""
    folder.mkdir()
    (folder / "config.json").write_bytes((FAMILIES / QWEN / "config.json").read_bytes())
    save_file({**load_file(FAMILIES / QWEN / "model.safetensors"), **added}, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize("case", STRANGE)
def test_a_router_with_tensors_that_its_family_lacks_is_not_known(case: str, tmp_path: Path) -> None:
    source = with_tensors(tmp_path / "source", STRANGE[case])
    inspection = quarkconv.inspect_checkpoint(source, deep=True)
    assert not [fact for fact in inspection.engines if fact.verdict == "int8"]
    assert not inspection.headline.startswith("Sound")
    assert "the routing" in " ".join(inspection.not_checked)
    (layer,) = quarkconv.verify_checkpoint(source, device="cpu", tokens=4).numbers.layers
    assert "the model's own routing is unknown: model.layers.0.mlp." in layer.routing


def test_the_routers_of_all_families_have_what_their_rows_say() -> None:
    for export in FAMILIES.iterdir():
        if export.is_dir():
            description = describe(export)
            for layer in description.moe_layers:
                found = expert_routing(description.config.raw, layer)
                assert not (isinstance(found, Unknown) and "among the router's tensors" in found.reason), (
                    export.name,
                    found,
                )


@pytest.mark.parametrize("leaf", ["weight_scale_2", "weight_global_scale", "weight_shape", "weight_g_idx"])
def test_companions_of_unknown_meaning_leave_no_verdict_and_no_proof(leaf: str, tmp_path: Path) -> None:
    source = with_tensors(tmp_path / "source", {f"{MOE}.experts.1.up_proj.{leaf}": torch.ones(2)})
    assert not [fact for fact in quarkconv.inspect_checkpoint(source).engines if fact.verdict == "int8"]
    skipped = quarkconv.verify_checkpoint(source, device="cpu").numbers.skipped
    assert skipped is not None
    assert f"{leaf} is among the experts, and its meaning is unknown" in skipped
    with pytest.raises(quarkconv.UnsupportedError, match="its meaning is unknown"):
        quarkconv.convert_checkpoint(source, "fused-int8", tmp_path / "fused")
    out = quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    assert quarkconv.verify_checkpoint(out, source, device="cpu").ok
