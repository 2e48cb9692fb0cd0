"""Channel INT8 without a config: read when the tensors leave no doubt, or with --scheme."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import assert_same_tensors, load, make_checkpoint
from support.program import run_cli

import quarkconv
from quarkconv.errors import UnsupportedError, UsageError


def without_config(folder: Path, quantization: dict[str, Any] | None = None, **fields: Any) -> Path:
    """A checkpoint of channel INT8 with scales [out, 1], whose config.json declares nothing, or another scheme."""
    root = make_checkpoint(folder, **{"column_scales": True, **fields})
    config = json.loads((root / "config.json").read_text())
    del config["quantization_config"]
    if quantization is not None:
        config["quantization_config"] = quantization
    (root / "config.json").write_text(json.dumps(config))
    return root


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "w8a8-int8", "quark", "bf16", "ascend"])
def test_tensors_that_leave_no_doubt_are_converted(tmp_path: Path, target: str) -> None:
    declared, root = make_checkpoint(tmp_path / "declared"), without_config(tmp_path / "model")
    inspection = quarkconv.inspect_checkpoint(root)
    assert inspection.to_json()["scheme"] == "ptpc_int8"
    assert inspection.headline.startswith("Read from the tensors, without a quantization_config: ptpc_int8, ")
    assert [(item.code, item.severity.value) for item in inspection.findings] == [("scheme-implied", "warning")]
    output = quarkconv.convert_checkpoint(root, target, tmp_path / "out").output
    expected = quarkconv.convert_checkpoint(declared, target, tmp_path / "expected").output
    assert_same_tensors(load(output), load(expected))
    assert json.loads((output / "config.json").read_text()) == json.loads((expected / "config.json").read_text())
    assert not [item for item in quarkconv.inspect_checkpoint(output).findings if item.code == "scheme-implied"]


@pytest.mark.parametrize(
    "fields", [{"scale_dtype": torch.bfloat16}, {"granularity": "per_tensor"}, {"zero_points": True}], ids=str
)
def test_tensors_that_leave_a_doubt_are_refused(tmp_path: Path, fields: dict[str, Any]) -> None:
    root = without_config(tmp_path / "model", **fields)
    assert "quant-config-missing" in {item.code for item in quarkconv.inspect_checkpoint(root).findings}
    with pytest.raises(UnsupportedError) as caught:
        quarkconv.convert_checkpoint(root, "quark", tmp_path / "out")
    assert "--scheme ptpc_int8" in (caught.value.hint or "")


def test_the_scheme_can_be_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = without_config(tmp_path / "model", scale_dtype=torch.bfloat16)
    arguments = ("convert", root, "--to", "quark", "--out", tmp_path / "out", "--scheme")
    assert run_cli(capsys, *arguments, "int4")[0] == 2
    assert run_cli(capsys, *arguments, "ptpc_int8")[0] == 0
    assert quarkconv.verify_checkpoint(tmp_path / "out", device="cpu", tokens=2).ok
    with pytest.raises(UsageError, match="--scheme"):
        quarkconv.plan_conversion(root, "quark", scheme="int8_static")


def test_sglangs_config_without_a_list_of_float_modules_gives_no_false_error(tmp_path: Path) -> None:
    quantization = {"activation_scheme": "dynamic", "bits": 8, "group_size": -1, "quant_method": "w8a8_int8"}
    root = without_config(tmp_path / "model", quantization)
    inspection = quarkconv.inspect_checkpoint(root)
    assert [item.code for item in inspection.findings] == []
    assert all(not support.losses for name, support in inspection.targets.items() if name != "bf16")
