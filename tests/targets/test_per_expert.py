"""The targets that name experts as the model does, on every export that can be converted, against plain torch."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from support.checkpoints import Tensors, assert_same_tensors, edit_checkpoint, load, make_checkpoint
from support.expected import expected_tensors
from support.exports import CONVERTIBLE, Checkpoints
from support.program import run_cli

import quarkconv
from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.findings import Severity
from quarkconv.scheme.formats.readers import declared_scheme

pytestmark = pytest.mark.long(20)

STATIC = "qwen3_moe-quark0.11-eager-int8_static"
TARGETS = ("compressed-tensors", "w8a8-int8", "bf16", "quark")
CASES = [(name, to) for name in CONVERTIBLE for to in TARGETS if (name, to) != (STATIC, "w8a8-int8")]
SHARDS = 30_000


class Converted:
    """Exports converted once for all tests of this file."""

    def __init__(self, checkpoints: Checkpoints, folder: Path) -> None:
        self.source = checkpoints
        self.folder = folder
        self.output = cache(self._convert)

    def _convert(self, name: str, to: str) -> Path:
        out = self.folder / f"{name}-{to}"
        return quarkconv.convert_checkpoint(self.source(name), to, out, max_shard_size=SHARDS, jobs=1).output


@pytest.fixture(scope="module")
def converted(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(checkpoints, tmp_path_factory.mktemp("converted"))


def config_of(root: Path) -> dict[str, Any]:
    value: dict[str, Any] = json.loads((root / "config.json").read_text())
    return value


@pytest.mark.parametrize(("name", "to"), CASES)
def test_tensors_are_what_torch_makes_of_the_source(
    checkpoints: Checkpoints, converted: Converted, name: str, to: str
) -> None:
    assert_same_tensors(load(converted.output(name, to)), expected_tensors(load(checkpoints(name)), to))


@pytest.mark.parametrize(("name", "to"), CASES)
def test_the_size_is_known_before(checkpoints: Checkpoints, converted: Converted, name: str, to: str) -> None:
    support = quarkconv.inspect_checkpoint(checkpoints(name)).targets[to]
    assert support.nbytes == sum(tensor.nbytes for tensor in load(converted.output(name, to)).values())


@pytest.mark.parametrize(("name", "to"), CASES)
def test_the_config_says_what_is_stored(checkpoints: Checkpoints, converted: Converted, name: str, to: str) -> None:
    before, after = config_of(checkpoints(name)), config_of(converted.output(name, to))
    found = quarkconv.inspect_checkpoint(converted.output(name, to))
    errors = {item.code for item in found.findings if item.severity is Severity.ERROR}
    if to == "bf16":
        assert "quantization_config" not in after
        assert errors == {"quant-config-missing"}
    else:
        assert errors == set()
        expected = {"compressed-tensors": "compressed-tensors", "w8a8-int8": "w8a8_int8", "quark": "quark"}
        assert after["quantization_config"]["quant_method"] == expected[to]
        assert found.scheme == ("int8_static" if name == STATIC else "ptpc_int8")
    for config in (before, after):
        config.pop("quantization_config", None)
        config.get("text_config", {}).pop("quantization_config", None)
    assert after == before


@pytest.mark.parametrize(("name", "to"), CASES)
def test_the_output_verifies_against_its_source(
    checkpoints: Checkpoints, converted: Converted, name: str, to: str
) -> None:
    found = quarkconv.verify_checkpoint(converted.output(name, to), checkpoints(name), "cpu", tokens=4)
    assert [item for item in found.problems if item.stage != "numbers"] == []
    assert found.bytes.against_source
    if name in CONVERTIBLE[:7]:  # the data of the others was stripped to zeros
        assert found.ok, found.problems
    assert bool(found.numbers.layers) is (to != "bf16")


@pytest.mark.parametrize("to", ["compressed-tensors", "w8a8-int8", "quark"])
def test_no_int8_module_is_ignored_and_every_float_one_is(converted: Converted, to: str) -> None:
    for name in CONVERTIBLE:
        if (name, to) == (STATIC, "w8a8-int8"):
            continue
        root = converted.output(name, to)
        quantization = config_of(root)["quantization_config"]
        ignored = set(quantization["exclude" if to == "quark" else "ignore"])
        tensors = load(root)
        int8 = {key.removesuffix(".weight") for key, value in tensors.items() if value.dtype == torch.int8}
        floats = {
            key.removesuffix(".weight")
            for key, value in tensors.items()
            if key.endswith(".weight") and value.ndim == 2 and value.dtype != torch.int8 and "embed" not in key
        }
        assert not int8 & ignored
        assert floats <= ignored


def test_compressed_tensors_and_w8a8_int8_have_the_same_shards(converted: Converted) -> None:
    name = "minimax_m2-quark0.13-f2f"
    first, second = converted.output(name, "compressed-tensors"), converted.output(name, "w8a8-int8")
    shards = sorted(path.name for path in first.glob("*.safetensors"))
    assert shards == sorted(path.name for path in second.glob("*.safetensors"))
    assert all((first / shard).read_bytes() == (second / shard).read_bytes() for shard in shards)


def test_w8a8_int8_refuses_static_activations(checkpoints: Checkpoints, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="static activation scales"):
        quarkconv.convert_checkpoint(checkpoints(STATIC), "w8a8-int8", tmp_path / "out")
    support = quarkconv.inspect_checkpoint(checkpoints(STATIC)).targets["w8a8-int8"]
    assert not support.supported
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("to", ["compressed-tensors", "bf16", "quark"])
@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_static_scales_of_every_layout_are_converted(tmp_path: Path, to: str, layout: str, dtype: torch.dtype) -> None:
    root = make_checkpoint(
        tmp_path / "model", layout=layout, granularity="per_tensor", input_scales=True, scale_dtype=dtype,
        zero_points=True,
    )  # fmt: skip
    out = quarkconv.convert_checkpoint(root, to, tmp_path / "out").output
    assert_same_tensors(load(out), expected_tensors(load(root), to))


def test_rounding_to_bf16_is_that_of_a_float64_reference(tmp_path: Path) -> None:
    """Products that lie halfway between two values of BF16, denormal ones, and ones beyond its largest."""
    root = make_checkpoint(tmp_path / "model", experts=2, hidden=64, intermediate=32)
    module = "model.layers.0.mlp.experts.1.gate_proj"
    generator = torch.Generator().manual_seed(3)
    scale = torch.randint(1, 2**31 - 2**23, (32,), generator=generator, dtype=torch.int32).view(torch.float32)
    scale[:4] = torch.tensor([1 + 2.0**-7, 2.0**-149, 3.0e38, 1.00390625])

    def change(tensors: Tensors) -> None:
        tensors[f"{module}.weight_scale"] = scale
        tensors[f"{module}.weight"][:] = torch.arange(-127, 129, 4)[:64].to(torch.int8)

    edit_checkpoint(root, change)
    out = quarkconv.convert_checkpoint(root, "bf16", tmp_path / "out").output
    codes = load(root)[f"{module}.weight"].double()
    rounded_once = (codes * scale.double().unsqueeze(1)).float()  # the F32 product
    found = load(out)[f"{module}.weight"]
    bits = rounded_once.view(torch.int32).long() & 0xFFFFFFFF
    expected = ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) & 0xFFFF
    assert torch.equal(found.view(torch.int16).long() & 0xFFFF, expected)
    assert found.isinf().any()
    assert (found == 0).any()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_bf16_refuses_a_scale_that_is_nan(tmp_path: Path, value: float) -> None:
    root = make_checkpoint(tmp_path / "model")
    name = "model.layers.0.mlp.experts.1.up_proj.weight_scale"
    edit_checkpoint(root, lambda tensors: tensors[name].__setitem__(3, value))
    with pytest.raises(SourceError, match="NaN or infinite") as caught:
        quarkconv.convert_checkpoint(root, "bf16", tmp_path / "out")
    assert (caught.value.code, caught.value.tensor) == ("scale-invalid", name)
    assert not (tmp_path / "out" / "config.json").exists()


def test_rows_of_different_scales_cannot_go_back_to_one_static_scale(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root = make_checkpoint(tmp_path / "model", granularity="per_tensor", input_scales=True)
    fused = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "fused").output
    name = "model.layers.0.mlp.experts.down_proj_scale"
    edit_checkpoint(fused, lambda tensors: tensors[name][2, 5].mul_(2))
    code, _, err = run_cli(capsys, "convert", fused, "--to", "quark", "--out", tmp_path / "out")
    assert code == 4
    assert name in err
    assert not (tmp_path / "out").exists()


def test_the_config_of_a_float16_model_becomes_bfloat16(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    config = config_of(root) | {"torch_dtype": "float16"}
    (root / "config.json").write_text(json.dumps(config))
    out = quarkconv.convert_checkpoint(root, "bf16", tmp_path / "out").output
    assert config_of(out)["torch_dtype"] == "bfloat16"


def test_the_quark_config_is_read_back_as_what_is_stored(converted: Converted) -> None:
    for name in CONVERTIBLE:
        root = converted.output(name, "quark")
        declared = declared_scheme(config_of(root)["quantization_config"])
        assert declared is not None
        assert declared.problems == []
        assert declared.version == "0.13"
        for key, value in load(root).items():
            module = key.removesuffix(".weight")
            if module != key and (value.ndim == 2 or value.dtype == torch.int8) and "embed" not in key:
                assert (declared.resolve(module).weight is not None) is (value.dtype == torch.int8), key
