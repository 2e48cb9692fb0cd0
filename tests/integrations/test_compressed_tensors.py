"""Our Converter in compressed-tensors' own pipeline, against our own conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import assert_same_tensors, edit_checkpoint, load, make_checkpoint
from support.exports import Checkpoints

import quarkconv
from quarkconv.errors import SourceError, UnsupportedError, UsageError
from quarkconv.integrations.compressed_tensors import QuarkInt8Converter


def convert_by_pipeline(source: Path, out: Path, converter: QuarkInt8Converter) -> None:
    """compressed-tensors' own conversion; imported here, since every worker imports every module of tests."""
    from compressed_tensors.entrypoints import convert

    convert.convert_checkpoint(source, out, converter, device="cpu")


NAMES = ("qwen3_moe-quark0.13-f2f", "mixtral-quark0.11-eager", "step3p5-like-3key_fused", "deepseek_v3-quark0.13-f2f")


def quantization(root: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((root / "config.json").read_text()).get("quantization_config", {})
    return value


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", ["compressed-tensors", "fused-int8", "bf16"])
def test_their_pipeline_gives_our_tensors(checkpoints: Checkpoints, tmp_path: Path, name: str, target: str) -> None:
    source = checkpoints(name)
    ours = quarkconv.convert_checkpoint(source, target, tmp_path / "ours").output
    convert_by_pipeline(source, tmp_path / "theirs", QuarkInt8Converter(source, target))
    assert_same_tensors(load(tmp_path / "theirs"), load(ours))
    mine, theirs = quantization(ours), quantization(tmp_path / "theirs")
    for key in ("quant_method", "format", "quantization_status", "ignore"):
        assert theirs.get(key) == mine.get(key)
    if target != "bf16":
        found = quarkconv.inspect_checkpoint(tmp_path / "theirs")
        assert found.ok
        assert found.scheme == "ptpc_int8"


def test_a_fused_checkpoint_is_divided_into_experts_one_by_one(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", layout="fused", granularity="per_tensor", scale_dtype=torch.bfloat16)
    ours = quarkconv.convert_checkpoint(root, "compressed-tensors", tmp_path / "ours").output
    convert_by_pipeline(root, tmp_path / "theirs", QuarkInt8Converter(root))
    assert_same_tensors(load(tmp_path / "theirs"), load(ours))


def test_a_zero_point_that_is_not_zero_is_refused(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", zero_points=True)
    name = "model.layers.0.mlp.experts.1.up_proj.weight_zero_point"
    edit_checkpoint(root, lambda tensors: tensors[name].fill_(1))
    with pytest.raises(UnsupportedError) as caught:
        convert_by_pipeline(root, tmp_path / "out", QuarkInt8Converter(root))
    assert caught.value.tensor == name


def test_a_tensor_without_its_scale_is_refused(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    converter, tensors = QuarkInt8Converter(root, "bf16"), load(root)
    name = "model.layers.0.self_attn.q_proj.weight"
    with pytest.raises(SourceError, match="came separately"):
        converter.process({name: tensors[name]})
    with pytest.raises(SourceError, match="another checkpoint"):
        converter.process({"other": tensors[name]})
    with pytest.raises(SourceError, match="another checkpoint"):
        converter.process({name: tensors[name][:1]})


def test_targets_outside_of_compressed_tensors_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not support this target"):
        QuarkInt8Converter(make_checkpoint(tmp_path / "model"), "quark")
