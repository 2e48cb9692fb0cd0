"""Layers of multi-token prediction as users reported them: kept, dropped, quantized, or missing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.model import Model, experts
from support.reported import QUANTIZED, codes, finding, load, refusal, with_mtp

from quarkconv import convert_checkpoint, inspect_checkpoint, plan_conversion, verify_checkpoint
from quarkconv.description.description import describe
from quarkconv.targets import TARGETS

# Layers of multi-token prediction


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("target", QUANTIZED)
def test_own_output_with_float_layers_of_prediction_has_no_errors(target: str, layout: str, tmp_path: Path) -> None:
    source = with_mtp(layout).write(tmp_path / "source")
    assert codes(source)["experts-not-quantized"] == "error"
    assert "--mtp drop" in finding(source, "experts-not-quantized").hint
    out = convert_checkpoint(source, target, tmp_path / "out").output
    assert inspect_checkpoint(out).ok
    assert verify_checkpoint(out, device="cpu", stages=("bytes",)).ok


@pytest.mark.parametrize("layout", ["fused", "split", "fp8"])
def test_layers_of_prediction_can_be_left_out(layout: str, tmp_path: Path) -> None:
    plain = Model().write(tmp_path / "plain")
    source = with_mtp(layout).write(tmp_path / "source")
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out", mtp="drop").output
    expected = load(convert_checkpoint(plain, "fused-int8", tmp_path / "expected").output)
    found = load(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((out / "config.json").read_text())["mtp_num_hidden_layers"] == 0
    plan = plan_conversion(source, "fused-int8", mtp="drop")
    assert [item.count for item in plan.losses if item.code == "mtp-dropped"] == [
        len(with_mtp(layout).second) - len(Model().second)
    ]
    assert verify_checkpoint(out, device="cpu", stages=("bytes",)).ok


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("target", QUANTIZED)
def test_layers_of_prediction_can_be_quantized(target: str, layout: str, tmp_path: Path) -> None:
    source = with_mtp(layout).write(tmp_path / "source")
    out = convert_checkpoint(source, target, tmp_path / "out", mtp="quantize").output
    assert inspect_checkpoint(out).ok
    assert all(layer.quantized for layer in describe(out).moe_layers)
    before, after = load(source), load(out)
    name = "mtp.layers.0.self_attn.o_proj.weight"
    scale = after[f"{name}_scale"].flatten()[:, None]
    errors = (after[name].double() * scale.double() - before[name].double()).abs()
    assert bool((errors <= 0.5000001 * scale.double()).all())  # half a step of 8 bits
    assert after["mtp.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert verify_checkpoint(out, device="cpu", stages=("bytes",)).ok


def test_a_layer_of_prediction_that_the_config_has_and_nothing_stores_is_named(tmp_path: Path) -> None:
    model = Model()
    model.config["num_nextn_predict_layers"] = 1
    assert finding(model.write(tmp_path), "mtp-missing").subject == "config.json"
    for name, tensor in experts("model.layers.2.mlp.experts", range(3)).items():
        model.second[name] = tensor
    assert "mtp-missing" not in [item.code for item in inspect_checkpoint(model.write(tmp_path)).findings]


@pytest.mark.parametrize(
    "names",
    [("model.layers.2.enorm.weight",), ("mtp.layers.0.norm.weight",), ("mtp.layers.0.norm.weight", "mtp.norm.weight")],
)
def test_layers_of_prediction_of_which_some_are_stored_are_named(names: tuple[str, ...], tmp_path: Path) -> None:
    model = Model()
    model.config["num_nextn_predict_layers"] = 3
    model.second |= {name: torch.ones(8).bfloat16() for name in names}
    found = finding(model.write(tmp_path), "mtp-missing")
    assert (found.count, "3 multi-token prediction layers" in found.message, "2 not stored" in found.message) == (
        2,
        True,
        True,
    )


def test_fp8_beside_int8_is_unsupported_and_the_option_is_named(tmp_path: Path) -> None:
    source = with_mtp("fp8").write(tmp_path)
    for target in TARGETS:
        error = refusal(source, target)
        assert error.exit_code == 4
        assert "--mtp drop" in (error.hint or "")
