"""longcat_flash as transformers saves it: experts that return their input have a gate and an up, and no down.

Published checkpoints have no tensors for these experts, and engines no place.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
from safetensors.torch import save_file
from support.checkpoints import Tensors, assert_same_tensors, load
from support.published import EXPERTS, PUBLISHED

import quarkconv
from quarkconv.description.description import describe
from quarkconv.targets import TARGETS

IDENTITIES: Final = 2


def saved(folder: Path, *, quantized: bool = True) -> Path:
    """The model with gate and up of experts that return their input: the codes of expert 0."""
    tensors = load(PUBLISHED["longcat_flash"].write(folder))
    for name in [name for name in tensors if ".experts.0." in name and ".down_proj." not in name]:
        for number in range(EXPERTS, EXPERTS + IDENTITIES):
            tensors[name.replace(".experts.0.", f".experts.{number}.")] = tensors[name].clone()
    if not quantized:
        tensors = in_float(tensors)
        edit_config(folder, quantization_config=None)
    save_file(tensors, folder / "model.safetensors")
    return folder


def in_float(tensors: Tensors) -> Tensors:
    scales = {name.removesuffix("_scale"): tensor for name, tensor in tensors.items() if name.endswith("weight_scale")}
    floats = {name: (tensors[name].float() * scale.view(-1, 1)).bfloat16() for name, scale in scales.items()}
    kept = {name: tensor for name, tensor in tensors.items() if not name.endswith("weight_scale")}
    return kept | floats


def codes_of(findings: tuple[quarkconv.Finding, ...]) -> list[str]:
    return [item.code for item in findings]


@pytest.mark.parametrize("target", TARGETS)
def test_every_target_leaves_them_out_and_names_them(target: str, tmp_path: Path) -> None:
    source, plain = saved(tmp_path / "source"), PUBLISHED["longcat_flash"].write(tmp_path / "plain")
    out = quarkconv.convert_checkpoint(source, target, tmp_path / "out").output
    found = load(out)
    assert_same_tensors(found, load(quarkconv.convert_checkpoint(plain, target, tmp_path / "expected").output))
    assert quarkconv.verify_checkpoint(out, source, device="cpu", tokens=4).problems == ()
    support = quarkconv.inspect_checkpoint(source).targets[target]
    assert [(loss.code, loss.count) for loss in support.losses] == [("tensor-dropped", 4 * IDENTITIES)]
    assert support.nbytes == sum(tensor.nbytes for tensor in found.values())


def test_those_in_float_are_left_out_too(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", quantized=False)
    out = quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "out", quantize="all").output
    assert not any(f".experts.{number}." in name for name in load(out) for number in (EXPERTS, EXPERTS + 1))
    assert quarkconv.verify_checkpoint(out, source, device="cpu", tokens=4).problems == ()


def test_inspect_names_them_and_no_engine_that_runs_the_checkpoint_as_it_is(tmp_path: Path) -> None:
    inspection = quarkconv.inspect_checkpoint(saved(tmp_path / "source"), deep=True)
    assert codes_of(inspection.findings) == ["identity-experts"]
    assert inspection.findings[0].count == 2 * IDENTITIES
    assert all(fact.form != "quark" for fact in inspection.engines if fact.verdict in ("int8", "w8a16"))
    assert inspection.advice


def test_numbers_are_those_without_them(tmp_path: Path) -> None:
    source, plain = saved(tmp_path / "source"), PUBLISHED["longcat_flash"].write(tmp_path / "plain")
    (layer,) = describe(source).moe_layers
    assert (layer.experts, layer.identities) == (EXPERTS, IDENTITIES)
    one, other = (quarkconv.verify_checkpoint(path, device="cpu", tokens=16) for path in (source, plain))
    assert one.problems == other.problems == ()
    (found,), (expected,) = one.numbers.layers, other.numbers.layers
    assert (found.routing, found.exact, found.dequantized) == (expected.routing, expected.exact, expected.dequantized)


def without(folder: Path, *ends: str) -> Path:
    tensors = {name: tensor for name, tensor in load(folder).items() if not any(end in name for end in ends)}
    save_file(tensors, folder / "model.safetensors")
    return folder


def edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def test_a_lost_down_an_up_without_a_gate_and_another_family_are_still_damage(tmp_path: Path) -> None:
    lost = without(saved(tmp_path / "lost"), f".experts.{EXPERTS - 1}.down_proj.")
    assert "expert-count" in codes_of(describe(lost).findings)
    gap = without(saved(tmp_path / "gap"), ".experts.0.down_proj.")
    assert "expert-missing" in codes_of(describe(gap).findings)
    no_gate = without(saved(tmp_path / "gate"), f".experts.{EXPERTS + 1}.gate_proj.")
    assert "expert-missing" in codes_of(describe(no_gate).findings)
    other = saved(tmp_path / "other")
    edit_config(other, model_type="qwen3_moe")
    assert "expert-missing" in codes_of(describe(other).findings)
