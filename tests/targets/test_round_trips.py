"""From one target to another and back: codes and scales stay what they are, bit for bit."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import assert_same_tensors, load, make_checkpoint
from support.expected import expected_tensors
from support.exports import CONVERTIBLE, Checkpoints
from support.program import snapshot

import quarkconv

pytestmark = pytest.mark.long(15)

STATIC = "qwen3_moe-quark0.11-eager-int8_static"
INT8 = ("fused-int8", "compressed-tensors", "w8a8-int8", "quark", "ascend")
DYNAMIC = ("w8a8-int8", "ascend")
"""Targets without static activation scales."""


Outward = Callable[[str, str], Path]
"""Name of an export, target -> the directory of its conversion."""


@pytest.fixture(scope="module")
def outward(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Outward:
    """Converts an export to a target, once for all tests of this file; they must not write to the result."""
    folder = tmp_path_factory.mktemp("outward")
    return cache(lambda name, target: chain(checkpoints(name), folder / name, target))


def chain(source: Path, folder: Path, *targets: str) -> Path:
    """Convert a checkpoint to one target after the other; returns the last output."""
    for number, target in enumerate(targets):
        source = quarkconv.convert_checkpoint(source, target, folder / f"{number}-{target}", jobs=1).output
    return source


def quantization(root: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((root / "config.json").read_text())["quantization_config"]
    return value


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_fused_to_quark_and_back_gives_the_same_bytes(outward: Outward, tmp_path: Path, name: str) -> None:
    fused = outward(name, "fused-int8")
    again = chain(fused, tmp_path / "back", "quark", "fused-int8")
    first, second = snapshot(fused), snapshot(again)
    assert first.keys() == second.keys()
    assert [file for file in first if first[file] != second[file]] == ["quarkconv.json"]  # it names its source's files


@pytest.mark.parametrize("name", CONVERTIBLE)
@pytest.mark.parametrize("via", ["compressed-tensors", "fused-int8"])
def test_quark_and_back_gives_the_codes_and_scales_of_the_export(
    checkpoints: Checkpoints, outward: Outward, tmp_path: Path, name: str, via: str
) -> None:
    back = chain(outward(name, via), tmp_path, "quark")
    assert_same_tensors(load(back), expected_tensors(load(checkpoints(name)), "quark"))


def ways() -> list[tuple[str, str, str]]:
    """(export, first target, last target)."""
    names = ("minimax_m2-quark0.13-f2f", "mixtral-quark0.11-eager", "step3p5-like-3key_fused", STATIC)
    every = [(name, via, to) for name in names for via in INT8 for to in (*INT8, "bf16")]
    return [way for way in every if way[0] != STATIC or not set(DYNAMIC) & set(way)]


@pytest.mark.parametrize(("name", "via", "to"), ways())
def test_every_way_leads_to_the_same_tensors(outward: Outward, tmp_path: Path, name: str, via: str, to: str) -> None:
    straight, around = outward(name, to), chain(outward(name, via), tmp_path, to)
    assert_same_tensors(load(around), load(straight))
    first, second = json.loads((straight / "config.json").read_text()), json.loads((around / "config.json").read_text())
    assert second == first


@pytest.mark.parametrize("to", INT8)
def test_a_target_made_of_itself_has_the_same_shards(checkpoints: Checkpoints, tmp_path: Path, to: str) -> None:
    once = chain(checkpoints("qwen3_moe-quark0.13-f2f"), tmp_path, to)
    twice = chain(once, tmp_path / "again", to)
    first, second = snapshot(once), snapshot(twice)
    assert [file for file in first if first[file] != second[file]] == ["quarkconv.json"]


@pytest.mark.parametrize("to", ["compressed-tensors", "quark"])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_fused_experts_that_were_one_tensor_in_the_source(tmp_path: Path, to: str, granularity: str) -> None:
    """From int8 stored as [E, 2I, H] with a scale per channel or per tensor, to experts one by one."""
    root = make_checkpoint(tmp_path / "model", layout="fused", granularity=granularity)
    stored, found = load(root), load(chain(root, tmp_path, to))
    both = stored["model.layers.0.mlp.experts.gate_up_proj"]
    scale = stored["model.layers.0.mlp.experts.gate_up_proj_scale"].reshape(3, -1).expand(3, 40)
    for expert in range(3):
        for leaf, rows in (("gate_proj", slice(0, 20)), ("up_proj", slice(20, 40))):
            module = f"model.layers.0.mlp.experts.{expert}.{leaf}"
            assert torch.equal(found[f"{module}.weight"], both[expert, rows])
            assert torch.equal(found[f"{module}.weight_scale"].flatten(), scale[expert, rows])
