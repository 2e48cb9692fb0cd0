"""Scales, routers and biases are checked on their way: `verify` would reject an output with wrong values in them."""

from __future__ import annotations

import json
import math
import random
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Tensors, edit_checkpoint, load, make_checkpoint
from support.exports import DATA, restore
from support.program import run_cli

import quarkconv
from quarkconv.convert.conversion import Conversion
from quarkconv.convert.options import Options
from quarkconv.errors import SourceError
from quarkconv.integrations.compressed_tensors import QuarkInt8Converter
from quarkconv.plan.shares import Share
from quarkconv.scheme.scale_values import are_finite, are_positive, zeros
from quarkconv.targets import TARGETS
from quarkconv.write.modes import Join, Mode, Whole

pytestmark = pytest.mark.long(15)

Capture = pytest.CaptureFixture[str]
NAN, INF = float("nan"), float("inf")
EXPERT = "model.layers.0.mlp.experts.2.down_proj"
LINEAR = "model.layers.0.self_attn.o_proj"
ROUTER = "model.layers.0.mlp.gate.weight"
LAYOUTS: dict[str, tuple[dict[str, Any], str]] = {
    "per_expert": ({}, f"{EXPERT}.weight_scale"),
    "stacked": ({"layout": "stacked"}, "model.layers.0.moe.up_proj.weight_scale"),
    "fused": ({"layout": "fused"}, "model.layers.0.mlp.experts.gate_up_proj_scale"),
    "BF16": ({"scale_dtype": torch.bfloat16}, f"{EXPERT}.weight_scale"),
    "F16": ({"scale_dtype": torch.float16}, f"{EXPERT}.weight_scale"),
    "per tensor": ({"granularity": "per_tensor"}, f"{EXPERT}.weight_scale"),
    "linear": ({}, f"{LINEAR}.weight_scale"),
}


def with_value(folder: Path, name: str, value: float, **fields: Any) -> Path:
    """A small checkpoint with a value in a tensor."""
    root = make_checkpoint(folder, **fields)
    edit_checkpoint(root, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    return root


def with_routing(root: Path) -> Path:
    """The checkpoint with the setting that its routing needs."""
    config = json.loads((root / "config.json").read_text())
    (root / "config.json").write_text(json.dumps({**config, "norm_topk_prob": True}))
    return root


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", TARGETS)
def test_a_scale_that_is_not_finite_ends_the_conversion(layout: str, to: str, tmp_path: Path) -> None:
    fields, name = LAYOUTS[layout]
    for value in (NAN, INF, -INF):
        root = with_value(tmp_path / "model", name, value, **fields)
        with pytest.raises(SourceError, match="A scale is NaN or infinite") as caught:
            quarkconv.convert_checkpoint(root, to, tmp_path / "out")
        assert (caught.value.code, caught.value.tensor) == ("scale-invalid", name)
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("to", TARGETS)
def test_a_scale_of_0_passes_only_with_codes_of_0(layout: str, to: str, tmp_path: Path) -> None:
    fields, name = LAYOUTS[layout]
    root = with_value(tmp_path / "model", name, 0.0, **fields)
    with pytest.raises(SourceError, match="A scale is zero, but the codes of its row are not") as caught:
        quarkconv.convert_checkpoint(root, to, tmp_path / "out")
    assert caught.value.tensor == name
    assert not (tmp_path / "out").exists()
    weight = name.removesuffix("_scale")

    def clear(tensors: Tensors) -> None:
        codes = tensors[weight]
        codes.view(1 if layout == "per tensor" else tensors[name].numel(), -1)[-1] = 0

    edit_checkpoint(root, clear)
    out = quarkconv.convert_checkpoint(root, to, tmp_path / "out").output
    if to != "bf16":
        assert quarkconv.verify_checkpoint(out, root, device="cpu", tokens=(2,)).ok


@pytest.mark.parametrize(("parallel", "size"), [("tp", 2), ("ep", 3)])
@pytest.mark.parametrize("value", [NAN, 0.0])
def test_ranks_check_the_scales_of_their_rows_and_columns(
    parallel: str, size: int, value: float, tmp_path: Path
) -> None:
    ranks: dict[str, Any] = {parallel: size}
    root = with_value(tmp_path / "model", f"{EXPERT}.weight_scale", value, experts=6, intermediate=32)
    with pytest.raises(SourceError) as caught:
        quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out", **ranks)
    assert caught.value.code == "scale-invalid"
    assert not (tmp_path / "out" / "ranks.json").exists()
    if value == 0:
        edit_checkpoint(root, lambda tensors: tensors[f"{EXPERT}.weight"][-1].fill_(0))
        quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out", **ranks)
        assert (tmp_path / "out" / "ranks.json").exists()


@pytest.mark.parametrize("mode", [Whole(), Whole(overwrite=True), Share(1, 1), Join()], ids=str)
def test_every_mode_checks_scales(mode: Mode, tmp_path: Path) -> None:
    root = with_value(tmp_path / "model", f"{EXPERT}.weight_scale", NAN)
    conversion = Conversion.prepare(root, "fused-int8", tmp_path / "out", Options(max_shard_size=6000))
    with pytest.raises(SourceError, match="A scale is NaN or infinite"):
        conversion.carry_out(mode)
    assert not (tmp_path / "out" / "config.json").exists()


def test_the_command_names_file_tensor_and_fix(tmp_path: Path, capsys: Capture) -> None:
    root = with_value(tmp_path / "model", f"{EXPERT}.weight_scale", NAN, shards=1)
    code, out, _ = run_cli(capsys, "convert", root, "--to", "fused-int8", "--out", tmp_path / "out", "--json")
    value = json.loads(out)
    assert code == 3
    assert (value["file"], value["tensor"]) == (
        str(root / "model-00001-of-00001.safetensors"),
        f"{EXPERT}.weight_scale",
    )
    assert (value["expected"], value["found"]) == ("finite values", "NaN or infinite values")
    assert value["hint"].startswith("download or copy the file again")


@pytest.mark.parametrize("value", [NAN, INF, 0.0, -1.0])
@pytest.mark.parametrize("to", ["fused-int8", "compressed-tensors", "quark"])
def test_static_scales_of_activations_are_finite_and_positive(value: float, to: str, tmp_path: Path) -> None:
    name = f"{EXPERT}.input_scale"
    root = make_checkpoint(tmp_path / "model", granularity="per_tensor", input_scales=True)
    edit_checkpoint(root, lambda tensors: tensors[name].fill_(value))
    with pytest.raises(SourceError) as caught:
        quarkconv.convert_checkpoint(root, to, tmp_path / "out")
    assert (caught.value.code, caught.value.tensor) == ("scale-invalid", name)


@pytest.mark.parametrize("value", [-0.01, 3.0e38, 2.0**-149])
@pytest.mark.parametrize("to", TARGETS)
def test_negative_large_and_subnormal_scales_are_scales(value: float, to: str, tmp_path: Path) -> None:
    root = with_value(tmp_path / "model", f"{LINEAR}.weight_scale", value)
    out = quarkconv.convert_checkpoint(root, to, tmp_path / "out").output
    if to != "bf16":
        assert load(out)[f"{LINEAR}.weight_scale"].view(-1)[-1] == torch.tensor(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("mode", [Whole(), Share(1, 1), Join()], ids=str)
def test_a_router_that_is_not_finite_ends_the_conversion(dtype: torch.dtype, mode: Mode, tmp_path: Path) -> None:
    root, name = with_routing(make_checkpoint(tmp_path / "model")), ROUTER

    def change(tensors: Tensors) -> None:
        tensors[name] = tensors[name].to(dtype)
        tensors[name][1, 2] = NAN

    edit_checkpoint(root, change)
    with pytest.raises(SourceError, match="A tensor of a router") as caught:
        Conversion.prepare(root, "fused-int8", tmp_path / "out").carry_out(mode)
    assert (caught.value.code, caught.value.tensor) == ("tensor-not-finite", name)
    assert not quarkconv.verify_checkpoint(root, device="cpu", tokens=(2,)).ok


def test_biases_of_experts_that_are_not_finite_end_the_conversion(tmp_path: Path) -> None:
    root = restore(DATA / "families" / "gpt_oss-0.13-eager", tmp_path / "model")
    name = next(name for name in load(root) if name.endswith("down_proj.bias"))
    edit_checkpoint(root, lambda tensors: tensors[name][3:4].fill_(INF))
    with pytest.raises(SourceError, match="bias of experts") as caught:
        quarkconv.convert_checkpoint(root, "compressed-tensors", tmp_path / "out")
    assert caught.value.tensor == name


def test_the_converter_of_pipelines_refuses_them_as_well(tmp_path: Path) -> None:
    for name in (f"{EXPERT}.weight_scale", ROUTER):
        root = with_routing(with_value(tmp_path / "model", name, NAN))
        with pytest.raises(SourceError, match="NaN or infinite"):
            QuarkInt8Converter(root).process(load(root))


def patterns() -> list[int]:
    """Bits of floats: the ends of every range, and random ones."""
    generator = random.Random(0)
    ends = [0, 1, 0x007FFFFF, 0x00800000, 0x3F800000, 0x7F000000, 0x7F7FFFFF, 0x7F800000, 0x7F800001, 0x7FFFFFFF]
    return [bits | sign for bits in ends for sign in (0, 1 << 31)] + [generator.getrandbits(32) for _ in range(2000)]


def test_values_are_judged_as_floats_are() -> None:
    for bits in patterns():
        data = struct.pack("<fI", 1.0, bits)
        value = struct.unpack("<ff", data)[1]
        assert are_finite(data) is math.isfinite(value)
        if math.isfinite(value):
            assert are_positive(data) is (value > 0)
        assert zeros(data) == ([1] if value == 0 else [])
    halves = torch.arange(2**16, dtype=torch.int32).to(torch.uint16)
    for dtype, kind in (("F16", torch.float16), ("BF16", torch.bfloat16)):
        for half, expected in enumerate(halves.view(kind).isfinite().tolist()):
            assert are_finite(struct.pack("<HH", 0x3C00, half), dtype) is expected
