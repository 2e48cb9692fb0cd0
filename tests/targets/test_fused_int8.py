"""fused-int8 against stacking with torch, on every export that can be converted, and against the rules of engines."""

from __future__ import annotations

import json
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from support.checkpoints import (
    Tensors,
    assert_same_tensors,
    edit_checkpoint,
    load,
    make_checkpoint,
    raw,
    stored_tensors,
    write_checkpoint,
)
from support.expected import FLOAT_IN_ENGINES, fused_int8
from support.exports import CONVERTIBLE, DATA, Checkpoints
from support.program import run_cli

import quarkconv
from quarkconv.convert.results import ConversionResult
from quarkconv.errors import UnsupportedError
from quarkconv.findings import Severity

SHARDS = 30_000  # small enough for several shards of every export


class Converted:
    """Exports converted once for all tests of this file."""

    def __init__(self, checkpoints: Checkpoints, folder: Path) -> None:
        self.source = checkpoints
        self.folder = folder
        self.result = cache(self._convert)

    def _convert(self, name: str) -> ConversionResult:
        return quarkconv.convert_checkpoint(
            self.source(name), "fused-int8", self.folder / name, max_shard_size=SHARDS, jobs=1
        )

    def output(self, name: str) -> Path:
        return self.result(name).output

    def config(self, name: str) -> dict[str, Any]:
        value: dict[str, Any] = json.loads((self.output(name) / "config.json").read_text())
        return value

    def ignore(self, name: str) -> list[str]:
        names: list[str] = self.config(name)["quantization_config"]["ignore"]
        return names


@pytest.fixture(scope="module")
def converted(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    return Converted(checkpoints, tmp_path_factory.mktemp("converted"))


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_tensors_equal_stacking_with_torch(checkpoints: Checkpoints, converted: Converted, name: str) -> None:
    expected = fused_int8(checkpoints(name))
    assert any(re.search(r"experts\.(gate_up_proj|w13)$", key) for key in expected)
    assert_same_tensors(load(converted.output(name)), expected)


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_nothing_of_the_source_form_is_left(converted: Converted, name: str) -> None:
    tensors = load(converted.output(name))
    assert not [key for key in tensors if "zero_point" in key]
    assert not [key for key, value in tensors.items() if value.dtype == torch.int8 and re.search(r"experts\.\d", key)]
    for key, value in tensors.items():
        if key.endswith(".weight") and value.dtype == torch.int8:
            assert (tensors[f"{key}_scale"].dtype, tensors[f"{key}_scale"].shape) == (torch.float32, (len(value), 1))


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_files_and_index_agree_with_the_plan(converted: Converted, name: str) -> None:
    result = converted.result(name)
    index = json.loads((result.output / "model.safetensors.index.json").read_text())
    found: dict[str, str] = {}
    for shard in result.plan.shards:
        path = result.output / shard.file
        assert path.stat().st_size == shard.nbytes
        with safe_open(path, "pt") as handle:
            found.update(dict.fromkeys(handle.keys(), shard.file))
    assert index["weight_map"] == found
    total = sum(value.numel() * value.element_size() for value in load(result.output).values())
    assert index["metadata"] == {"total_size": total}
    written = {path.relative_to(result.output).as_posix() for path in result.output.rglob("*") if path.is_file()}
    config, index_name, manifest = "config.json", "model.safetensors.index.json", "quarkconv.json"
    extra = {copy.name for copy in result.plan.copies}
    assert written == {*(shard.file for shard in result.plan.shards), *extra, config, index_name, manifest}
    generated = sum((result.output / file).stat().st_size for file in (config, index_name, manifest))
    assert sum((result.output / file).stat().st_size for file in written) == result.plan.output_bytes + generated


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_the_size_is_known_before(checkpoints: Checkpoints, converted: Converted, name: str) -> None:
    inspection = quarkconv.inspect_checkpoint(checkpoints(name))
    total = sum(value.numel() * value.element_size() for value in load(converted.output(name)).values())
    assert inspection.targets["fused-int8"].nbytes == total == converted.result(name).plan.tensor_bytes


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_the_output_has_no_errors(converted: Converted, name: str) -> None:
    inspection = quarkconv.inspect_checkpoint(converted.output(name))
    assert [item for item in inspection.findings if item.severity is Severity.ERROR] == []
    moe = inspection.to_json()["moe"]
    assert moe is not None
    assert moe["layers"] == [layer.index for layer in inspection.description.moe_layers]


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_config_is_the_compressed_tensors_form_and_nothing_else_changes(
    checkpoints: Checkpoints, converted: Converted, name: str
) -> None:
    before = json.loads((checkpoints(name) / "config.json").read_text())
    after = converted.config(name)
    quantization = after.pop("quantization_config")
    static = name == "qwen3_moe-quark0.11-eager-int8_static"
    strategy, dynamic = ("tensor", False) if static else ("token", True)
    inputs = {"num_bits": 8, "type": "int", "strategy": strategy, "symmetric": True, "dynamic": dynamic}
    weights = {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False}
    ignore = quantization.pop("ignore")
    kv_cache = quantization.pop("kv_cache_scheme", None)
    assert (kv_cache is not None) is (name == "qwen3_moe-0.11-eager-kv_cache_fp8")
    assert quantization == {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
    }
    assert ignore == sorted(set(ignore))
    before.pop("quantization_config", None)
    for part in (before, after):
        part.get("text_config", {}).pop("quantization_config", None)
    assert after == before


def modules(root: Path) -> tuple[set[str], set[str]]:
    """(int8, float) linears of a source; embeddings are looked up, not multiplied, and belong to neither."""
    int8, floats = set(), set()
    for name, dtype, shape in stored_tensors(root):
        module = name.removesuffix(".weight")
        if module != name and dtype == "I8":
            int8.add(module)
        elif module != name and len(shape) == 2 and not module.endswith(("embed_tokens", "pos_embed")):
            floats.add(module)
    return int8, floats


PARTS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}


@pytest.mark.parametrize("name", CONVERTIBLE)
def test_ignore_names_the_float_linears(checkpoints: Checkpoints, converted: Converted, name: str) -> None:
    int8, floats = modules(checkpoints(name))
    floats |= {module for module in int8 if module.endswith(FLOAT_IN_ENGINES)}
    int8 -= floats
    ignore = set(converted.ignore(name))
    assert floats <= ignore
    assert not int8 & ignore
    for module in int8:  # what is merged with an int8 linear is not ignored either
        head, _, leaf = module.rpartition(".")
        for merged, parts in PARTS.items():
            if leaf in parts:
                assert f"{head}.{merged}" not in ignore
    for module in floats:
        head, _, leaf = module.rpartition(".")
        for merged, parts in PARTS.items():
            if leaf in parts and ".experts." not in module:
                assert f"{head}.{merged}" in ignore
    experts = {match[1] for module in int8 if (match := re.match(r"(.+\.experts)\.\d+\.", module))}
    assert not [entry for entry in ignore for prefix in experts if entry == prefix or entry.startswith(f"{prefix}.")]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_moe-quark0.13-f2f", ["lm_head", *(f"model.layers.{n}.mlp.gate" for n in range(3))]),
        ("mixtral-quark0.11-eager", ["lm_head", *(f"model.layers.{n}.block_sparse_moe.gate" for n in range(3))]),
        (
            "qwen2_moe-0.13-f2f-shared_expert",
            ["lm_head", *(f"model.layers.{n}.mlp.{gate}" for n in range(2) for gate in ("gate", "shared_expert_gate"))],
        ),
    ],
)
def test_ignore_names_these_modules_and_no_others(converted: Converted, name: str, expected: list[str]) -> None:
    assert converted.ignore(name) == expected


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("glm4_moe-0.13-f2f-mtp_bf16", "model.layers.2.mlp.experts"),
        ("qwen3_moe-0.13-f2f-layer_excluded", "model.layers.1.mlp.experts"),
        ("qwen3_5_moe-0.13-f2f-language_model", "mtp.layers.0.mlp.experts"),
    ],
)
def test_experts_left_in_float_are_ignored_as_engines_expect(converted: Converted, name: str, layer: str) -> None:
    # vLLM and SGLang look up these three names of a fused MoE layer, and must find all of them or none.
    loaded = {f"{layer}.0.{leaf}" for leaf in ("gate_proj", "up_proj", "down_proj")}
    assert {layer, *loaded} <= set(converted.ignore(name))


def test_a_linear_in_float_beside_one_in_int8_is_ignored_alone(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    module = "model.layers.0.self_attn.q_proj"

    def dequantize(tensors: Tensors) -> None:
        del tensors[f"{module}.weight_scale"]
        tensors[f"{module}.weight"] = tensors[f"{module}.weight"].bfloat16()

    edit_checkpoint(root, dequantize)
    out = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out").output
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    assert ignore == ["lm_head", "model.layers.0.mlp.gate", module]


def test_float_linears_of_a_wrapped_model_have_their_names_in_sglang_too(tmp_path: Path) -> None:
    out = quarkconv.convert_checkpoint(DATA / "families" / "glm5_next-0.13-f2f", "w8a8-int8", tmp_path / "out").output
    ignore = set(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    attention, image = "layers.0.self_attn.o_proj", "blocks.0.attn.qkv"
    assert {f"model.language_model.{attention}", f"model.{attention}", f"model.visual.{image}"} <= ignore
    assert f"visual.{image}_proj" in ignore
    assert not [module for module in ignore if ".mlp.experts" in module or ".shared_experts." in module]


def test_float_linears_of_deepseek_v4_have_their_names_in_sglang_too(tmp_path: Path) -> None:
    out = quarkconv.convert_checkpoint(DATA / "families" / "deepseek_v4-0.13-f2f", "w8a8-int8", tmp_path / "out").output
    ignore = set(json.loads((out / "config.json").read_text())["quantization_config"]["ignore"])
    layer = "model.layers.0"
    assert {f"{layer}.attn.wq_b", f"{layer}.self_attn.wq_b", f"{layer}.self_attn.wqkv_a", f"{layer}.mlp.gate"} <= ignore


def test_experts_in_float_named_w_are_ignored_as_engines_expect(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", layers=2, family="w1")
    config = json.loads((root / "config.json").read_text())
    config["quantization_config"]["exclude"].append("model.layers.1.*")

    def dequantize(tensors: Tensors) -> None:
        for name in [name for name in tensors if name.startswith("model.layers.1.") and name.endswith("weight_scale")]:
            weight = name.removesuffix("_scale")
            tensors[weight] = (tensors[weight] * tensors.pop(name)[:, None]).bfloat16()

    edit_checkpoint(root, dequantize)
    (root / "config.json").write_text(json.dumps(config))
    out = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out").output
    ignore = json.loads((out / "config.json").read_text())["quantization_config"]["ignore"]
    layer = "model.layers.1.mlp.experts"
    assert {layer, f"{layer}.0.gate_proj", f"{layer}.0.up_proj", f"{layer}.0.down_proj", f"{layer}.2.w3"} <= set(ignore)
    assert not [entry for entry in ignore if entry.startswith("model.layers.0.mlp.experts")]
    assert_same_tensors(load(out), fused_int8(root))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("family", ["gate_proj", "w1"])
def test_scales_of_every_kind_are_converted(
    tmp_path: Path, layout: str, family: str, granularity: str, dtype: torch.dtype
) -> None:
    root = make_checkpoint(
        tmp_path / "model", layers=2, layout=layout, family=family, granularity=granularity, scale_dtype=dtype,
        zero_points=True,
    )  # fmt: skip
    out = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out").output
    assert_same_tensors(load(out), fused_int8(root))


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
def test_static_input_scales_are_one_for_each_expert(tmp_path: Path, layout: str) -> None:
    root = make_checkpoint(tmp_path / "model", layout=layout, granularity="per_tensor", input_scales=True)
    out = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out").output
    tensors = load(out)
    assert_same_tensors(tensors, fused_int8(root))
    prefix = "model.layers.0.moe.experts" if layout == "stacked" else "model.layers.0.mlp.experts"
    for leaf in ("gate_up_proj", "down_proj"):
        scale = tensors[f"{prefix}.{leaf}_input_scale"]
        assert (scale.dtype, scale.shape) == (torch.float32, (3,))
        assert len(set(scale.tolist())) == 3


def test_a_fused_checkpoint_stays_what_it_is(converted: Converted, tmp_path: Path) -> None:
    for name in ("qwen3_moe-quark0.13-f2f", "mixtral-quark0.11-eager"):
        again = quarkconv.convert_checkpoint(converted.output(name), "fused-int8", tmp_path / name).output
        assert_same_tensors(load(again), load(converted.output(name)))
        assert json.loads((again / "config.json").read_text()) == converted.config(name)


def set_one(name: str) -> Any:
    """A change of one element of a tensor by the smallest step."""

    def change(tensors: Tensors) -> None:
        flat = tensors[name].reshape(-1).clone()
        flat[-1] = 1 if flat.dtype == torch.int8 else torch.nextafter(flat[-1], torch.tensor(torch.inf))
        tensors[name] = flat.reshape(tensors[name].shape)

    return change


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight_zero_point",
        "model.layers.1.mlp.experts.2.down_proj.weight_zero_point",
    ],
)
def test_a_zero_point_that_is_not_zero_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    root = make_checkpoint(tmp_path / "model", layers=2, zero_points=True)
    edit_checkpoint(root, set_one(name))
    code, _, err = run_cli(capsys, "convert", root, "--to", "fused-int8", "--out", tmp_path / "out")
    assert code == 4
    assert name in err
    assert not (tmp_path / "out").exists()


def test_a_zero_point_of_fused_experts_is_read_as_well(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", layout="fused", zero_points=True)
    out = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "zero").output
    assert not [name for name in load(out) if "zero_point" in name]
    edit_checkpoint(root, set_one("model.layers.0.mlp.experts.gate_up_proj_zero_point"))
    with pytest.raises(UnsupportedError, match="gate_up_proj_zero_point"):
        quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("layout", ["per_expert", "stacked"])
@pytest.mark.parametrize("projection", ["gate_proj", "up_proj"])
def test_input_scales_of_gate_and_up_that_differ_are_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], layout: str, projection: str
) -> None:
    root = make_checkpoint(tmp_path / "model", layout=layout, granularity="per_tensor", input_scales=True)
    module = f"moe.{projection}" if layout == "stacked" else f"mlp.experts.2.{projection}"
    edit_checkpoint(root, set_one(f"model.layers.0.{module}.input_scale"))
    code, _, err = run_cli(capsys, "convert", root, "--to", "fused-int8", "--out", tmp_path / "out")
    assert code == 4
    assert "input scale" in err
    assert not (tmp_path / "out").exists()


def test_down_may_have_an_input_scale_of_its_own(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", granularity="per_tensor", input_scales=True)
    edit_checkpoint(root, set_one("model.layers.0.mlp.experts.2.down_proj.input_scale"))
    out = quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out").output
    assert_same_tensors(load(out), fused_int8(root))


def test_tensors_that_are_not_understood_pass_through(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    tensors = load(root)
    strange = {
        "model.layers.0.mlp.gate.e_score_correction_bias": torch.randn(3),
        "model.layers.0.self_attn.q_proj.bias": torch.randn(24).half(),
        "model.rotary.inv_freq": torch.randn(7).double(),
        "model.ids": torch.arange(5),
        "model.empty": torch.empty(0, 4),
        "vision.conv.weight": torch.randn(4, 3, 2, 2).bfloat16(),
    }
    write_checkpoint(root, {**tensors, **strange}, json.loads((root / "config.json").read_text()), 2)
    out = load(quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out").output)
    assert {name: raw(out[name]) for name in strange} == {name: raw(value) for name, value in strange.items()}
    assert_same_tensors(out, fused_int8(root))


@pytest.mark.parametrize("granularity", ["per_channel", "per_tensor"])
def test_an_int8_weight_of_three_dimensions_is_dequantized_with_the_scale_of_each_row(
    tmp_path: Path, granularity: str
) -> None:
    root = make_checkpoint(tmp_path / "model")
    weight = torch.randint(-127, 128, (2, 5, 8), dtype=torch.int8)
    scale = torch.rand(2, 5) if granularity == "per_channel" else torch.rand(2)
    name = "model.layers.0.mlp.mixer.weight"
    edit_checkpoint(root, lambda tensors: tensors.update({name: weight, f"{name}_scale": scale}))
    inspection = quarkconv.inspect_checkpoint(root)
    out = load(quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out").output)
    rows = scale[..., None] if granularity == "per_channel" else scale[:, None, None].expand(2, 5, 1)
    assert torch.equal(out[name], (weight.double() * rows.double()).to(torch.bfloat16))
    assert f"{name}_scale" not in out
    total = sum(value.numel() * value.element_size() for value in out.values())
    assert inspection.targets["fused-int8"].nbytes == total
