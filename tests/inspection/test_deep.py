"""``inspect --deep``: scales and zero points are read, weights never."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.exports import Checkpoints
from support.model import FIRST, Model
from support.program import run_cli

from quarkconv import Inspection, QuarkconvError, convert_checkpoint, inspect_checkpoint


def found(inspection: Inspection) -> list[tuple[str, str, str, int]]:
    """Severity, code, subject and count of every finding."""
    return [(item.severity.value, item.code, item.subject, item.count) for item in inspection.findings]


O_PROJ = "model.layers.0.self_attn.o_proj"
BAD = {"nan": float("nan"), "inf": float("inf"), "-inf": float("-inf"), "0": 0.0, "-0": -0.0}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("value", BAD.values(), ids=BAD)
def test_deep_finds_an_invalid_scale(value: float, dtype: torch.dtype, tmp_path: Path) -> None:
    model = Model()
    model.set(f"{O_PROJ}.weight_scale", torch.tensor([1.0] * 7 + [value], dtype=dtype))
    folder = model.write(tmp_path)
    inspection = inspect_checkpoint(folder, deep=True)
    invalid = [item for item in found(inspection) if item[1] == "scale-invalid"]
    assert invalid == [("warning" if value == 0 else "error", "scale-invalid", f"{O_PROJ}.weight_scale", 1)]
    assert not inspection.headline.startswith("Sound")
    assert inspection.ok is (value == 0)
    assert inspect_checkpoint(folder).ok


@pytest.mark.parametrize(("value", "is_zero"), [(0.0, True), (-0.0, True), (float("nan"), False)])
def test_the_hint_about_a_scale_of_zero_says_when_it_is_harmless(value: float, is_zero: bool, tmp_path: Path) -> None:
    model = Model()
    model.set(f"{O_PROJ}.weight_scale", torch.tensor([1.0] * 7 + [value]))
    (error,) = inspect_checkpoint(model.write(tmp_path), deep=True).findings
    assert ("harmless if their codes are 0 too" in error.hint) is is_zero


@pytest.mark.parametrize(
    ("name", "expected"),
    [("weight_scale", ("info", "scale-negative")), ("input_scale", ("error", "scale-invalid"))],
)
def test_only_scales_of_weights_may_be_negative(name: str, expected: tuple[str, str], tmp_path: Path) -> None:
    model = Model()
    shape = (8,) if name == "weight_scale" else ()
    model.set(f"{O_PROJ}.{name}", torch.full(shape, -0.5))
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert (*expected, f"{O_PROJ}.{name}", 1) in found(inspection)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_deep_accepts_the_smallest_and_largest_scales(dtype: torch.dtype, tmp_path: Path) -> None:
    limits = torch.finfo(dtype)
    model = Model()
    values = [limits.smallest_normal / 4, limits.smallest_normal, limits.max, 1.0] * 2
    model.set(f"{O_PROJ}.weight_scale", torch.tensor(values, dtype=dtype))
    assert (model.first[f"{O_PROJ}.weight_scale"] > 0).all()
    assert inspect_checkpoint(model.write(tmp_path), deep=True).ok


@pytest.mark.parametrize("name", ["weight_scale", "input_scale", "output_scale"])
def test_deep_reads_every_kind_of_scale(name: str, tmp_path: Path) -> None:
    model = Model()
    model.set(f"{O_PROJ}.{name}", torch.zeros(8 if name == "weight_scale" else (), dtype=torch.float32))
    subjects = {
        item[2] for item in found(inspect_checkpoint(model.write(tmp_path), deep=True)) if item[1] == "scale-invalid"
    }
    assert subjects == {f"{O_PROJ}.{name}"}


@pytest.mark.parametrize("value", [1, -1, -128])
def test_deep_finds_a_zero_point_that_is_not_zero(value: int, tmp_path: Path) -> None:
    model = Model()
    for layer in (0, 1):
        zero_point = torch.tensor([0] * 7 + [value], dtype=torch.int8)
        model.set(f"model.layers.{layer}.self_attn.o_proj.weight_zero_point", zero_point)
    errors = [item for item in found(inspect_checkpoint(model.write(tmp_path), deep=True)) if item[0] == "error"]
    assert errors == [("error", "zero-point-nonzero", f"{O_PROJ}.weight_zero_point", 2)]


@pytest.mark.parametrize(
    ("name", "value"), [("weight_scale", torch.full((8,), torch.inf)), ("weight_zero_point", torch.ones(8).char())]
)
def test_no_target_and_no_engine_is_named_for_values_at_which_conversion_stops(
    name: str, value: torch.Tensor, tmp_path: Path
) -> None:
    model = Model()
    model.set(f"{O_PROJ}.{name}", value)
    source = model.write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert inspection.engines == ()
    assert len(inspection.targets) == 6
    for target, support in inspection.targets.items():
        assert support.reason is not None
        assert "Conversion stops at values" in support.reason
        with pytest.raises(QuarkconvError):
            convert_checkpoint(source, target, tmp_path / target)
    assert all(support.supported for support in inspect_checkpoint(source).targets.values())


def test_deep_finds_the_zero_points_of_an_asymmetric_export(
    checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    path = checkpoints("qwen3_moe-0.11-eager-asymmetric")
    _, text, _ = run_cli(capsys, "inspect", path, "--deep", "--json")
    codes = [item["code"] for item in json.loads(text)["findings"]]
    assert codes == ["scheme-unsupported", "zero-point-nonzero", "scale-narrow", "zero-point-present"]


@pytest.mark.parametrize("name", ["qwen3_moe-quark0.13-f2f", "mixtral-quark0.11-eager", "step3p5-like-3key_fused"])
def test_deep_finds_nothing_in_a_sound_export(
    name: str, checkpoints: Checkpoints, capsys: pytest.CaptureFixture[str]
) -> None:
    code, _, _ = run_cli(capsys, "inspect", checkpoints(name), "--deep")
    assert code == 0


def test_deep_reads_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = Model().write(tmp_path)
    scales = {
        name: ref for name, ref in inspect_checkpoint(folder).description.checkpoint.refs().items() if "_scale" in name
    }
    read: list[tuple[int, int]] = []
    plain = os.pread

    def pread(descriptor: int, length: int, offset: int) -> bytes:
        read.append((length, offset))
        return plain(descriptor, length, offset)

    monkeypatch.setattr(os, "pread", pread)
    assert inspect_checkpoint(folder, deep=True).ok
    assert sorted(read) == sorted((ref.nbytes, ref.start) for ref in scales.values())


def test_deep_leaves_truncated_files_alone(tmp_path: Path) -> None:
    model = Model()
    model.set(f"{O_PROJ}.weight_scale", torch.zeros(8))
    folder = model.write(tmp_path)
    raw = (folder / FIRST).read_bytes()
    (folder / FIRST).write_bytes(raw[:-1])
    assert {item[1] for item in found(inspect_checkpoint(folder, deep=True))} == {"shard-truncated"}


@pytest.mark.parametrize("layout", ["stacked", "fused"])
def test_a_static_input_scale_for_each_expert_is_not_one_for_each_channel(tmp_path: Path, layout: Any) -> None:
    """As many experts as inputs, like Qwen3-Next's down_proj: 512 of both."""
    sizes: dict[str, Any] = {"experts": 16, "hidden": 16, "intermediate": 16}
    options: dict[str, Any] = {"granularity": "per_tensor", "input_scales": True}
    root = make_checkpoint(tmp_path / "model", layout=layout, **sizes, **options)
    assert found(inspect_checkpoint(root, deep=True)) == []
