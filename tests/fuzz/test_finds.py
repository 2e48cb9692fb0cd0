"""What fuzzing found, each as small as it could be made."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.hostile import judge
from support.model import Model

from quarkconv import convert_checkpoint, plan_conversion
from quarkconv.plan.manifest import read_manifest
from quarkconv.targets import TARGETS

CONFIGS: dict[str, dict[str, Any]] = {
    "an export that is a string, carried over to the target quark": {"export": "real_quantized"},
    "an export that is a list": {"export": [1]},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_configs_that_fuzzing_found_are_handled(name: str, tmp_path: Path) -> None:
    model = Model()
    model.quantization.update(CONFIGS[name])
    folder = model.write(tmp_path / "model")
    for target in TARGETS:
        json.dumps(plan_conversion(folder, target).to_json())


def test_half_a_surrogate_pair_in_the_producer_version_is_handled(tmp_path: Path) -> None:
    model = Model()
    model.quantization["version"] = "\ud800"
    output = convert_checkpoint(model.write(tmp_path / "model"), "fused-int8", tmp_path / "out").output
    manifest = read_manifest(output)
    assert manifest is not None
    assert manifest.producer_version == "\ud800"


def test_a_static_input_scale_in_64_bits_would_shift_what_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Eight bytes under a header that says four."""
    import torch

    model = Model()
    model.set("model.layers.0.self_attn.o_proj.input_scale", torch.tensor(0.5, dtype=torch.float64))
    verdict = judge(model.write(tmp_path / "model"), capsys)
    assert (verdict.inspect, verdict.convert) == (1, 4)
    assert "scale-dtype" in verdict.codes
