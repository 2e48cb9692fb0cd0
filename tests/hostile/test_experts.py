"""Experts, scales and zero points that lie."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.hostile import judge
from support.model import Model
from support.moe_model import INDEX
from support.raw import entry, raw_file, write_json

from quarkconv import inspect_checkpoint, verify_checkpoint
from quarkconv.errors import SourceError
from quarkconv.findings import CODES

EXPERTS = "model.layers.0.mlp.experts"
GATE = f"{EXPERTS}.1.gate_proj"


def codes(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, dtype=torch.int8)


def numbered(model: Model, number: str) -> None:
    """Gives an expert another number."""
    old = f"{EXPERTS}.2."
    for shard in model.shards:
        for name in [name for name in shard if name.startswith(old)]:
            shard[name.replace(old, f"{EXPERTS}.{number}.", 1)] = shard.pop(name)


def set_all(model: Model, suffix: str, value: Callable[[torch.Tensor], torch.Tensor]) -> None:
    for shard in model.shards:
        for name in [name for name in shard if name.endswith(suffix)]:
            shard[name] = value(shard[name])


CORRUPTED: dict[str, tuple[Callable[[Model], object], str]] = {
    "an expert that is missing": (lambda model: model.remove(f"{EXPERTS}.1."), "expert-missing"),
    "a projection that is missing": (lambda model: model.remove(f"{EXPERTS}.1.up_proj"), "expert-missing"),
    "an expert of number 10^9 - 1": (lambda model: numbered(model, "999999999"), "expert-missing"),
    "an expert of number 10^30": (lambda model: numbered(model, f"1{'0' * 30}"), "expert-count"),
    "an expert of number 02": (lambda model: numbered(model, "02"), "expert-count"),
    "an expert of another shape": (lambda model: model.set(f"{GATE}.weight", codes(5, 8)), "expert-shape"),
    "experts of no elements": (
        lambda model: (
            set_all(model, "gate_proj.weight", lambda _: codes(0, 8)),
            set_all(model, "up_proj.weight", lambda _: codes(0, 8)),
            set_all(model, "down_proj.weight", lambda _: codes(8, 0)),
        ),
        "expert-shape",
    ),
    "a linear without elements": (
        lambda model: model.set("model.layers.0.self_attn.o_proj.weight", codes(2**40, 0)),
        "weight-shape",
    ),
    "a linear of a trillion matrices": (
        lambda model: model.set("model.layers.0.self_attn.o_proj.weight", codes(2**20, 2**20, 0, 1)),
        "weight-shape",
    ),
    "a scale that is missing": (lambda model: model.remove(f"{GATE}.weight_scale"), "scale-missing"),
    "a scale of another length": (lambda model: model.set(f"{GATE}.weight_scale", torch.ones(3)), "scale-shape"),
    "a scale in F64": (lambda model: model.set(f"{GATE}.weight_scale", torch.ones(4).double()), "scale-dtype"),
    "an input scale in F64": (lambda model: model.set(f"{GATE}.input_scale", torch.ones(()).double()), "scale-dtype"),
    "an input scale of no elements": (lambda model: model.set(f"{GATE}.input_scale", torch.ones(0)), "scale-shape"),
    "an input scale for each of three": (lambda model: model.set(f"{GATE}.input_scale", torch.ones(3)), "scale-shape"),
    "a zero point of another shape": (
        lambda model: model.set(f"{GATE}.weight_zero_point", codes(3)),
        "zero-point-shape",
    ),
    "experts one by one and in one tensor": (
        lambda model: model.set(f"{EXPERTS}.gate_up_proj", codes(3, 8, 8)),
        "layout-conflict",
    ),
    "experts under two namings": (
        lambda model: model.set(f"{EXPERTS}.1.w1.weight", codes(4, 8)),
        "layout-conflict",
    ),
    "another number of experts than the config says": (
        lambda model: model.config.update(num_experts=10**9),
        "expert-count",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CORRUPTED)
def test_inconsistent_experts_are_refused(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    corrupt, code = CORRUPTED[name]
    model = Model()
    corrupt(model)
    verdict = judge(model.write(tmp_path / "model"), capsys)
    assert verdict.inspect == 1
    assert code in verdict.codes
    corrupt_source = CODES[code].blocks is SourceError
    assert verdict.convert == (3 if corrupt_source else 4)
    assert verdict.error["code"] in verdict.codes or not corrupt_source


VALUES = {
    "NaN": (float("nan"), "scale-invalid"),
    "infinite": (float("inf"), "scale-invalid"),
    "zero": (0.0, "scale-invalid"),
    "negative zero": (-0.0, "scale-invalid"),
    "negative": (-1.0, "scale-negative"),
    "subnormal": (1e-40, "scale-subnormal"),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", VALUES)
def test_unusable_scales_are_refused(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    value, code = VALUES[name]
    model = Model()
    model.set(f"{GATE}.weight_scale", torch.tensor([1.0, value, 1.0, 1.0]).to(dtype))
    source = model.write(tmp_path / "model")
    inspection = inspect_checkpoint(source, deep=True)
    found = [(item.code, item.subject) for item in inspection.findings if item.code != "scale-narrow"]
    assert found == [(code, f"{GATE}.weight_scale")]
    assert inspection.ok is (code in ("scale-subnormal", "scale-negative") or value == 0)
    if value == 0:  # over codes that are not, which inspect does not read
        assert not verify_checkpoint(source, device="cpu").ok


def test_nonzero_zero_points_are_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model = Model()
    model.set(f"{GATE}.weight_zero_point", torch.tensor([0, 0, 0, 1], dtype=torch.int8))
    verdict = judge(model.write(tmp_path / "model"), capsys)
    assert (verdict.inspect, verdict.convert) == (0, 4)
    assert "zero point is not zero" in verdict.error["error"]
    findings = inspect_checkpoint(tmp_path / "model", deep=True).findings
    assert "zero-point-nonzero" in {item.code for item in findings}


def sparse(folder: Path, tensors: dict[str, tuple[str, list[int], int]], config: dict[str, Any]) -> Path:
    """A checkpoint of one file that is a header and a hole."""
    folder.mkdir()
    header, position = {}, 0
    for name, (dtype, shape, nbytes) in tensors.items():
        header[name] = entry(dtype, shape, position, position + nbytes)
        position += nbytes
    raw = raw_file(header)
    (folder / "model.safetensors").write_bytes(raw)
    os.truncate(folder / "model.safetensors", len(raw) + position)
    write_json(folder / "config.json", config)
    return folder


@pytest.mark.parametrize("experts", [2**16 + 1, 10**9, 10**12, 2**62])
@pytest.mark.parametrize("layout", ["stacked", "fused"])
def test_numbers_of_experts_without_bytes_are_harmless(
    layout: str, experts: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Tensors of no bytes may claim any number of experts."""
    if layout == "stacked":
        names = ["model.layers.0.moe.gate_proj", "model.layers.0.moe.up_proj", "model.layers.0.moe.down_proj"]
        tensors = {f"{name}.weight": ("I8", [experts, 0, 0], 0) for name in names}
        tensors |= {f"{name}.weight_scale": ("F32", [experts, 0], 0) for name in names}
    else:
        names = [f"{EXPERTS}.gate_up_proj", f"{EXPERTS}.down_proj"]
        tensors = {name: ("I8", [experts, 0, 0], 0) for name in names}
        tensors |= {f"{name}_scale": ("F32", [experts, 0, 1], 0) for name in names}
    verdict = judge(sparse(tmp_path / "model", tensors, Model().config), capsys)
    assert (verdict.inspect, verdict.convert) == (1, 3)
    assert {"expert-shape", "weight-shape"} <= set(verdict.codes)


def test_very_many_wrong_layers_add_one_finding(tmp_path: Path) -> None:
    tensors = {f"model.layers.{i}.mlp.experts.1.gate_proj.weight": ("I8", [1, 1], 1) for i in range(3000)}
    inspection = inspect_checkpoint(sparse(tmp_path / "model", tensors, Model().config))
    missing = [item for item in inspection.findings if item.code == "expert-missing"]
    assert len(missing) == 201
    assert "2800 more of these" in missing[-1].message
    assert sum(item.count for item in missing) == 3000


def test_a_layer_number_of_a_thousand_digits_is_harmless(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_checkpoint(tmp_path / "model", shards=1)
    file = next(folder.glob("*.safetensors"))
    raw = file.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    header = raw[8 : 8 + length].replace(b"model.layers.0.", b"model.layers." + b"9" * 900 + b".")
    file.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])
    for index in folder.glob(INDEX):
        value = json.loads(index.read_text())
        value["weight_map"] = {name.replace(".0.", f".{'9' * 900}.", 1): file.name for name in value["weight_map"]}
        index.write_text(json.dumps(value))
    verdict = judge(folder, capsys)
    assert verdict.convert in (0, 3)
    assert inspect_checkpoint(folder).to_json()["moe"]["layers"][0] == 999_999_999
