"""Every finding code, each triggered by spoiling one thing in a sound model."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.model import SECOND, Model, experts, int8_linear
from support.moe_model import INDEX
from support.quark_config import STATIC_INPUT, TENSOR_WEIGHT, WEIGHT, layer_config
from support.raw import write_json

from quarkconv import inspect_checkpoint
from quarkconv.findings import CODES, finding

Found = tuple[str, str, str, int]
"""Severity, code, subject, count."""

O_PROJ = "model.layers.0.self_attn.o_proj"
EXPERTS = "model.layers.0.mlp.experts"
LATER = "model.layers.1.mlp.experts"
MIXED: Found = ("warning", "mixed-scheme", "quantization_config", 1)


def nothing(_: object) -> None:
    pass


@dataclass(frozen=True)
class Case:
    name: str
    expected: tuple[Found, ...]
    change: Callable[[Model], object] = nothing
    damage: Callable[[Path], object] = nothing
    deep: bool = False


def truncate(folder: Path) -> None:
    os.truncate(folder / SECOND, (folder / SECOND).stat().st_size - 1)


def break_header(folder: Path) -> None:
    raw = (folder / SECOND).read_bytes()
    (folder / SECOND).write_bytes(raw[:8] + b"[" + raw[9:])


def edit_index(folder: Path, *, add: dict[str, str] | None = None, drop: str | None = None) -> None:
    index = json.loads((folder / INDEX).read_text())
    index["weight_map"].update(add or {})
    index["weight_map"].pop(drop, None)
    write_json(folder / INDEX, index)


def float8(model: Model) -> None:
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        model.set(name, torch.ones(8, 8).to(torch.float8_e4m3fn))


def declared_float8(model: Model) -> None:
    float8(model)
    layer = layer_config()
    model.quantization["layer_quant_config"] = {
        "*o_proj": {**layer, **{part: {**layer[part], "dtype": "fp8_e4m3"} for part in ("weight", "input_tensors")}}
    }


def per_tensor_attention(model: Model, *, inputs: object = None, stored_input: bool = False) -> None:
    config = layer_config(TENSOR_WEIGHT) if inputs is None else layer_config(TENSOR_WEIGHT, inputs)
    model.quantization["layer_quant_config"] = {"*o_proj": config}
    for layer in (0, 1):
        module = f"model.layers.{layer}.self_attn.o_proj"
        model.set(f"{module}.weight_scale", torch.tensor(0.5))
        if stored_input:
            model.set(f"{module}.input_scale", torch.tensor(0.5))


def keep_float_to_quantize_at_load(model: Model) -> None:
    model.quantization["export"]["weight_format"] = "fake_quantized"
    for layer in (0, 1):
        model.set(f"model.layers.{layer}.self_attn.o_proj.weight", torch.rand(8, 8).bfloat16())


def nothing_quantized(model: Model) -> None:
    model.to_float("model.")
    model.quantization["exclude"] = ["*"]


def leave_layer_out(model: Model) -> None:
    model.to_float(LATER)
    model.quantization["exclude"].append("*layers.1.mlp.experts*")


def leave_projection_out(model: Model) -> None:
    model.to_float(*(f"{LATER}.{number}.down_proj" for number in range(3)))
    model.quantization["exclude"].append("*layers.1.mlp.experts.*.down_proj")


def dense(model: Model, *, quantized: bool) -> None:
    model.remove("model.layers.0.mlp", "model.layers.1.mlp")
    del model.config["num_experts"]
    if not quantized:
        model.to_float("model.")
        model.quantization["exclude"] = ["*"]


def rename(model: Model, old: str, new: str) -> None:
    for shard in model.shards:
        for name in [name for name in shard if old in name]:
            shard[name.replace(old, new)] = shard.pop(name)


def resize_layer(model: Model) -> None:
    model.second |= experts(LATER, range(3), intermediate=6)


def widen_expert(model: Model) -> None:
    model.first |= int8_linear(f"{EXPERTS}.2.up_proj", 5, 8)


def set_tensor(name: str, value: torch.Tensor) -> Callable[[Model], None]:
    return lambda model: model.set(name, value)


def remove(*prefixes: str) -> Callable[[Model], None]:
    return lambda model: model.remove(*prefixes)


def in_float(*prefixes: str) -> Callable[[Model], None]:
    return lambda model: model.to_float(*prefixes)


def configure(**changes: object) -> Callable[[Model], None]:
    return lambda model: model.quantization.update(changes)


UNUSED_SCALE = torch.rand(8)

CASES = (
    Case("sound", ()),
    Case("sound, deep", (), deep=True),
    # What cannot be read
    Case(
        "no config.json",
        (("error", "config-invalid", "config.json", 1), ("error", "quant-config-missing", "config.json", 1)),
        damage=lambda folder: (folder / "config.json").unlink(),
    ),
    Case(
        "config.json is a list",
        (("error", "config-invalid", "config.json", 1), ("error", "quant-config-missing", "config.json", 1)),
        damage=lambda folder: (folder / "config.json").write_text("[]"),
    ),
    Case("no second shard", (("error", "shard-missing", SECOND, 1),), damage=lambda folder: (folder / SECOND).unlink()),
    Case("truncated shard", (("error", "shard-truncated", SECOND, 1),), damage=truncate),
    Case("header that is not an object", (("error", "header-invalid", SECOND, 1),), damage=break_header),
    Case(
        "index without weight_map",
        (("error", "index-invalid", INDEX, 1),),
        damage=lambda folder: write_json(folder / INDEX, {"metadata": {}}),
    ),
    Case(
        "index that names the wrong file",
        (("error", "index-mismatch", "lm_head.weight", 1),),
        damage=lambda folder: edit_index(folder, add={"lm_head.weight": SECOND}),
    ),
    Case(
        "index that names a tensor that is nowhere",
        (("error", "index-mismatch", "model.new.weight", 1),),
        damage=lambda folder: edit_index(folder, add={"model.new.weight": SECOND}),
    ),
    Case(
        "index that leaves a tensor out",
        (("error", "index-mismatch", "lm_head.weight", 1),),
        damage=lambda folder: edit_index(folder, drop="lm_head.weight"),
    ),
    Case(
        "two tensors in both shards",
        (("error", "tensor-duplicate", "lm_head.weight", 2),),
        lambda model: model.second.update({n: model.first[n].clone() for n in ("lm_head.weight", "model.norm.weight")}),
    ),
    Case(
        "a file that the index does not name",
        (("warning", "file-unused", "extra.safetensors", 1),),
        damage=lambda folder: save_file({"model.extra": torch.ones(1)}, folder / "extra.safetensors"),
    ),
    # What the config claims
    Case(
        "int8 without quantization_config",
        (("warning", "scheme-implied", "config.json", 1),),
        lambda model: model.config.pop("quantization_config"),
    ),
    Case(
        "int8 with zero points, without quantization_config",
        (("error", "quant-config-missing", "config.json", 1), ("info", "zero-point-present", O_PROJ, 1)),
        lambda model: (
            model.config.pop("quantization_config"),
            model.set(f"{O_PROJ}.weight_zero_point", torch.zeros(8, dtype=torch.int8)),
        ),
    ),
    Case(
        "scales named after the quantizer",
        (("warning", "quantizer-names", SECOND, 1),),
        lambda model: model.second.update(
            {
                name.replace("_scale", "_quantizer.scale"): model.second.pop(name)
                for name in list(model.second)
                if name.endswith("_scale")
            }
        ),
    ),
    Case(
        "an online rotation",
        (("error", "rotation-online", "quantization_config.algo_config[0]", 1),),
        configure(algo_config=[{"name": "rotation", "r4": True}]),
    ),
    Case(
        "a layer of multi-token prediction that is not stored",
        (("info", "mtp-missing", "config.json", 2),),
        lambda model: model.config.update(num_nextn_predict_layers=2),
    ),
    Case(
        "an int8 router",
        (("error", "float-module-quantized", "model.layers.0.mlp.gate", 1),),
        lambda model: (
            model.first.update(int8_linear("model.layers.0.mlp.gate", 3, 8)),
            configure(exclude=["lm_head", "model.layers.1.mlp.gate"])(model),
        ),
    ),
    Case(
        "a field of the wrong type",
        (("error", "quant-config-invalid", "quantization_config.export", 1),),
        configure(export=[]),
    ),
    Case("fp8 attention", (("error", "scheme-unsupported", O_PROJ, 2),), float8),
    Case("fp8 attention, declared", (("info", "mixed-precision", O_PROJ, 2),), declared_float8),
    Case(
        "activations not quantized",
        (("error", "scheme-unsupported", "quantization_config", 20),),
        configure(global_quant_config=layer_config(inputs=None)),
    ),
    Case(
        "asymmetric weights",
        (("error", "scheme-unsupported", "quantization_config", 20),),
        configure(global_quant_config=layer_config(weight={**WEIGHT, "symmetric": False})),
    ),
    Case(
        "a method that is not read",
        (("error", "scheme-unsupported", "quantization_config", 20),),
        configure(quant_method="gptq"),
    ),
    Case(
        "float to be quantized at load", (("error", "scheme-unsupported", O_PROJ, 2),), keep_float_to_quantize_at_load
    ),
    Case(
        "everything excluded and in float",
        (
            ("error", "scheme-unsupported", "quantization_config", 1),
            ("info", "experts-excluded", EXPERTS, 3),
            ("info", "experts-excluded", LATER, 3),
        ),
        nothing_quantized,
    ),
    Case("attention per tensor", (MIXED,), per_tensor_attention),
    Case(
        "one scale where the config says one per channel",
        (("error", "granularity-mismatch", O_PROJ, 1), MIXED),
        set_tensor(f"{O_PROJ}.weight_scale", torch.tensor(0.5)),
    ),
    Case(
        "a static input scale that the config does not declare",
        (("error", "granularity-mismatch", O_PROJ, 2), MIXED),
        lambda model: per_tensor_attention(model, stored_input=True),
    ),
    Case(
        "excluded and int8",
        (("error", "excluded-but-quantized", "model.layers.1.self_attn.o_proj", 1),),
        lambda model: model.quantization["exclude"].append("model.layers.1.self_attn.o_proj"),
    ),
    Case("a linear in float", (("error", "quantized-but-stored-float", O_PROJ, 1),), in_float(O_PROJ)),
    Case("one expert in float", (("error", "experts-not-quantized", EXPERTS, 1),), in_float(f"{EXPERTS}.1.")),
    Case("a layer of experts in float", (("error", "experts-not-quantized", LATER, 3),), in_float(LATER)),
    Case(
        "one projection of every expert in float",
        (("error", "experts-not-quantized", LATER, 3),),
        in_float(*(f"{LATER}.{number}.down_proj" for number in range(3))),
    ),
    Case(
        "one projection of every expert in float, and excluded",
        (("error", "experts-not-quantized", LATER, 3),),
        leave_projection_out,
    ),
    Case("a layer of experts excluded and in float", (("info", "experts-excluded", LATER, 3),), leave_layer_out),
    # What is stored
    Case("no scale", (("error", "scale-missing", O_PROJ, 1),), remove(f"{O_PROJ}.weight_scale")),
    Case(
        "static activations declared, no input scale",
        (("error", "scale-missing", O_PROJ, 2), MIXED),
        lambda model: per_tensor_attention(model, inputs=STATIC_INPUT),
    ),
    Case(
        "a scale too short", (("error", "scale-shape", O_PROJ, 1),), set_tensor(f"{O_PROJ}.weight_scale", torch.rand(3))
    ),
    Case(
        "a scale in F64",
        (("error", "scale-dtype", O_PROJ, 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.rand(8).double()),
    ),
    Case(
        "codes that are declared in another dtype",
        (("error", "dtype-mismatch", f"{EXPERTS}.0.down_proj", 20),),
        lambda model: model.quantization["global_quant_config"]["weight"].update(dtype="int4"),
    ),
    Case(
        "factors of inputs beside the weight",
        (
            ("error", "smoothing-online", f"{O_PROJ}.pre_quant_scale", 1),
            ("warning", "tensor-unrecognised", f"{O_PROJ}.pre_quant_scale", 1),
        ),
        set_tensor(f"{O_PROJ}.pre_quant_scale", torch.ones(8)),
    ),
    Case(
        "a tensor of unknown meaning beside the weight",
        (("warning", "companion-unknown", f"{O_PROJ}.permutation", 1),),
        set_tensor(f"{O_PROJ}.permutation", torch.arange(8)),
    ),
    Case(
        "a scale in BF16",
        (("info", "scale-narrow", O_PROJ, 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.ones(8).bfloat16()),
    ),
    Case(
        "a scale in F16",
        (("info", "scale-narrow", O_PROJ, 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.ones(8).half()),
    ),
    Case(
        "a scale that is NaN",
        (("error", "scale-invalid", f"{O_PROJ}.weight_scale", 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.tensor([1.0] * 7 + [float("nan")])),
        deep=True,
    ),
    Case(
        "a scale with a negative value",
        (("info", "scale-negative", f"{O_PROJ}.weight_scale", 1),),
        set_tensor(f"{O_PROJ}.weight_scale", torch.tensor([1.0] * 7 + [-0.5])),
        deep=True,
    ),
    Case(
        "names of transformers' classes, which engines do not know",
        (("warning", "expert-names", EXPERTS, 2),),
        lambda model: model.config.update(model_type="mixtral"),
    ),
    Case(
        "a zero point",
        (("info", "zero-point-present", O_PROJ, 1),),
        set_tensor(f"{O_PROJ}.weight_zero_point", torch.zeros(8, dtype=torch.int8)),
        deep=True,
    ),
    Case(
        "a zero point of another shape",
        (("error", "zero-point-shape", O_PROJ, 1), ("info", "zero-point-present", O_PROJ, 1)),
        set_tensor(f"{O_PROJ}.weight_zero_point", torch.zeros(1, dtype=torch.int8)),
    ),
    Case(
        "a zero point that is not zero",
        (
            ("error", "zero-point-nonzero", f"{O_PROJ}.weight_zero_point", 1),
            ("info", "zero-point-present", O_PROJ, 1),
        ),
        set_tensor(f"{O_PROJ}.weight_zero_point", torch.tensor([0] * 7 + [-1], dtype=torch.int8)),
        deep=True,
    ),
    Case(
        "codes without a module",
        (("warning", "tensor-unrecognised", "model.codes", 1),),
        set_tensor("model.codes", torch.zeros(4, dtype=torch.int8)),
    ),
    Case(
        "a scale without a weight",
        (("warning", "tensor-unrecognised", "model.lost.weight_scale", 1),),
        set_tensor("model.lost.weight_scale", UNUSED_SCALE),
    ),
    Case(
        "an expert numbered twice",
        (("warning", "tensor-unrecognised", f"{EXPERTS}.01.gate_proj", 1),),
        lambda model: model.first.update(int8_linear(f"{EXPERTS}.01.gate_proj", 4, 8)),
    ),
    # What the experts look like
    Case("a projection missing", (("error", "expert-missing", EXPERTS, 1),), remove(f"{EXPERTS}.1.up_proj")),
    Case("an expert missing", (("error", "expert-missing", LATER, 1),), remove(f"{LATER}.1.")),
    Case(
        "experts missing far up",
        (("error", "expert-missing", EXPERTS, 998),),
        lambda model: rename(model, f"{EXPERTS}.2.", f"{EXPERTS}.1000."),
    ),
    Case("a projection too wide", (("error", "expert-shape", f"{EXPERTS}.2.up_proj", 1),), widen_expert),
    Case(
        "another number of experts in the config",
        (("error", "expert-count", EXPERTS, 1), ("error", "expert-count", LATER, 1)),
        lambda model: model.config.update(num_experts=4),
    ),
    Case(
        "experts one by one and fused",
        (("error", "layout-conflict", EXPERTS, 1),),
        set_tensor(f"{EXPERTS}.gate_up_proj", torch.rand(3, 8, 8).bfloat16()),
    ),
    Case(
        "experts in two namings",
        (("error", "layout-conflict", EXPERTS, 1),),
        lambda model: rename(model, f"{EXPERTS}.2.up_proj", f"{EXPERTS}.2.w3"),
    ),
    Case(
        "a config of another hidden size",
        (("warning", "config-mismatch", "model.layers.0.mlp", 2),),
        lambda model: model.config.update(hidden_size=16),
    ),
    Case(
        "no router",
        (("warning", "router-mismatch", "model.layers.0.mlp.gate.weight", 1),),
        lambda model: model.remove("model.layers.0.mlp.gate."),
    ),
    Case(
        "a part of a merged linear in float",
        (("warning", "merged-mixed", "model.layers.0.self_attn.k_proj", 1),),
        lambda model: (
            model.first.update(int8_linear("model.layers.0.self_attn.q_proj", 8, 8)),
            model.first.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(8, 8).bfloat16()}),
            model.quantization["exclude"].append("model.layers.0.self_attn.k_proj"),
        ),
    ),
    Case("a layer of other size", (("info", "layer-geometry", LATER, 1),), resize_layer),
    Case(
        "the part of a rank",
        (("warning", "rank-part", "config.json", 1),),
        lambda model: model.config.update(quarkconv_rank={"parallel": "tp", "rank": 0, "world_size": 2}),
    ),
    Case(
        "experts under other names",
        (("error", "experts-not-understood", f"{EXPERTS}.0.d_proj", 18),),
        lambda model: [rename(model, f".{old}.", f".{old[0]}_proj.") for old in ("up_proj", "gate_proj", "down_proj")],
    ),
    Case("dense", (("warning", "not-moe", "config.json", 1),), lambda model: dense(model, quantized=True)),
    Case(
        "dense and not quantized",
        (
            ("error", "not-moe", "config.json", 1),
            ("error", "scheme-unsupported", "quantization_config", 1),
        ),
        lambda model: dense(model, quantized=False),
    ),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_exactly_these_findings(case: Case, tmp_path: Path) -> None:
    model = Model()
    case.change(model)
    folder = model.write(tmp_path)
    case.damage(folder)

    inspection = inspect_checkpoint(folder, deep=case.deep)

    found = [(item.severity.value, item.code, item.subject, item.count) for item in inspection.findings]
    assert sorted(found) == sorted(case.expected)
    assert inspection.ok is all(severity != "error" for severity, *_ in case.expected)


OF_CONVERSIONS = {"setting-dropped", "tensor-dropped", "module-dequantized", "mtp-dropped", "left-in-float"}
"""Found of a conversion, not of a checkpoint: tests/targets/test_settings.py, tests/cases."""
OF_ASCEND = {"description-mismatch"}
"""In tests/targets/test_ascend.py."""
HOSTILE = {"file-outside", "index-total-size", "tensor-name", "weight-shape", "scale-subnormal"}
"""Found of checkpoints that somebody made to deceive: tests/hostile."""


def test_every_code_is_triggered() -> None:
    found_elsewhere = OF_CONVERSIONS | OF_ASCEND | HOSTILE
    assert {code for case in CASES for _, code, _, _ in case.expected} == set(CODES) - found_elsewhere


def test_errors_come_first_then_warnings_then_info(tmp_path: Path) -> None:
    model = Model()
    model.set(f"{O_PROJ}.weight_scale", torch.tensor(0.5).bfloat16())
    severities = [item.severity.value for item in inspect_checkpoint(model.write(tmp_path)).findings]
    assert severities == ["error", "warning", "info"]


def test_an_unknown_code_is_refused() -> None:
    with pytest.raises(KeyError):
        finding("no-such-code", "subject", "message")


@pytest.mark.parametrize("code", CODES)
def test_codes_are_kebab_case_and_explained(code: str) -> None:
    assert code == code.lower()
    assert code.replace("-", "").isalpha()
    assert CODES[code].meaning.endswith(".")
