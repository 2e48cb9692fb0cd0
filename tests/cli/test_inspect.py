"""``quarkconv inspect`` on every export, on the command line and from Python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from support.commands import Run
from support.model import SECOND, Model
from support.quark_config import STATIC_INPUT, WEIGHT, layer_config

from quarkconv import Inspection, inspect_checkpoint
from quarkconv.findings import CODES

DATA = Path(__file__).parents[1] / "data"
TRUTH: dict[str, dict[str, Any]] = json.loads((DATA / "exports" / "exports.json").read_text())

Found = tuple[str, str, str, int]
"""Severity, code, subject, count."""


@pytest.fixture
def run(command: Run) -> Run:
    """Run ``quarkconv inspect`` in this process."""
    return lambda *arguments: command("inspect", *arguments)


def found(inspection: Inspection) -> list[Found]:
    return [(item.severity.value, item.code, item.subject, item.count) for item in inspection.findings]


def eager(module: str, narrow: int, zero_points: int) -> list[Found]:
    """What every export of the eager mode has: scales in BF16 where they are per channel, and zero points."""
    return [("info", "scale-narrow", module, narrow), ("info", "zero-point-present", module, zero_points)]


def experts(layer: int, moe: str = "model.layers.{}.mlp") -> str:
    return f"{moe.format(layer)}.experts"


DOWN = "model.layers.0.mlp.experts.0.down_proj"
DENSE: Found = ("warning", "not-moe", "config.json", 1)
MIXED: Found = ("warning", "mixed-scheme", "quantization_config", 1)
NOT_W8A8: Found = ("error", "scheme-unsupported", "quantization_config", 32)
WRAPPED = "model.language_model.layers.{}.mlp"

MTP_MISSING: Found = ("info", "mtp-missing", "config.json", 1)
FINDINGS: dict[str, list[Found]] = {
    "deepseek_v3-quark0.13-f2f": [MTP_MISSING],
    "deepseek_v3-0.13-f2f-mtp": [("warning", "float-module-quantized", "model.layers.2.eh_proj", 2)],
    "glm4_moe-0.13-f2f-experts_only": [MTP_MISSING],
    "glm4_moe-0.13-f2f-mtp_bf16": [("info", "experts-excluded", experts(2), 4)],
    "qwen2_moe-0.11-eager-shared_expert": eager(DOWN, 38, 38),
    "qwen3-0.13-eager-dense": [DENSE, *eager("model.layers.0.mlp.down_proj", 14, 14)],
    "qwen3-0.13-f2f-dense": [DENSE],
    "qwen3_5_moe-0.13-f2f-experts_left_3d": [
        ("error", "experts-not-quantized", experts(layer, WRAPPED), 4) for layer in (0, 1)
    ],
    "qwen3_5_moe-0.13-f2f-language_model": [("error", "experts-not-quantized", "mtp.layers.0.mlp.experts", 4)],
    "qwen3_moe-0.11-eager-asymmetric": [NOT_W8A8, *eager(DOWN, 32, 32)],
    "qwen3_moe-0.11-eager-attention_static": [MIXED, *eager(DOWN, 25, 32)],
    "qwen3_moe-0.11-eager-channel_weight_static_input": [NOT_W8A8, *eager(DOWN, 32, 32)],
    "qwen3_moe-0.11-eager-kv_cache_fp8": eager(DOWN, 32, 32),
    "qwen3_moe-0.11-eager-layer_type": [MIXED, *eager(DOWN, 24, 32)],
    "qwen3_moe-0.11-eager-sharded": eager(DOWN, 48, 48),
    "qwen3_moe-0.11-f2f": [("info", "scale-narrow", DOWN, 32)],
    "qwen3_moe-0.13-f2f-attention_per_tensor": [MIXED],
    "qwen3_moe-0.13-f2f-exclude_patterns_on_disk": [("info", "experts-excluded", experts(1), 4)],
    "qwen3_moe-0.13-f2f-experts_per_projection": [MIXED],
    "qwen3_moe-0.13-f2f-int4_fp8": [("error", "scheme-unsupported", DOWN, 32)],
    "qwen3_moe-0.13-f2f-int8_static_without_input_scale": [("error", "scale-missing", DOWN, 32)],
    "qwen3_moe-0.13-f2f-int8_weight_only": [NOT_W8A8],
    "qwen3_moe-0.13-f2f-layer_excluded": [("info", "experts-excluded", experts(1), 4)],
    "qwen3_moe-0.13-f2f-mxfp4_experts": [("error", "scheme-unsupported", DOWN, 24)],
    "qwen3_moe-0.13-f2f-ptpc_fp8": [("error", "scheme-unsupported", DOWN, 32)],
    "qwen3_moe-0.13-f2f-some_experts_excluded": [
        ("error", "experts-not-quantized", experts(1), 2),
        ("error", "experts-not-quantized", experts(2), 4),
    ],
    # the fixtures
    "mixtral-quark0.11-eager": eager("model.layers.0.block_sparse_moe.experts.0.w1", 66, 66),
    "mixtral-quark0.13-eager-experts_left_bf16": [
        *(("error", "experts-not-quantized", experts(layer), 6) for layer in range(3)),
        ("warning", "expert-names", experts(0), 3),
        *eager("model.layers.0.self_attn.k_proj", 12, 12),
    ],
    "qwen3_moe-bf16": [("error", "quant-config-missing", "config.json", 1)],
    "qwen3_moe-quark0.11-eager-int8_static": [("info", "zero-point-present", DOWN, 84)],
}
"""Of every export that is not without findings."""

FIXTURE_SCHEMES = {
    "qwen3_moe-quark0.13-f2f": "ptpc_int8",
    "minimax_m2-quark0.13-f2f": "ptpc_int8",
    "deepseek_v3-quark0.13-f2f": "ptpc_int8",
    "mixtral-quark0.11-eager": "ptpc_int8",
    "step3p5-like-3key_fused": "ptpc_int8",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight": "int8_per_tensor_weight",
    "qwen3_moe-quark0.11-eager-int8_static": "int8_static",
    "mixtral-quark0.13-eager-experts_left_bf16": "ptpc_int8",
    "qwen3_moe-bf16": None,
}


ALL = (*FIXTURE_SCHEMES, *TRUTH)


def test_no_export_is_left_out() -> None:
    assert {path.name for path in (DATA / "exports").iterdir() if path.is_dir()} == set(TRUTH)
    fixtures = {path.name for path in (DATA / "fixtures").iterdir() if path.is_dir()}
    assert fixtures | {"qwen3_moe-quark0.13-f2f"} == set(FIXTURE_SCHEMES)
    assert set(FINDINGS) <= set(ALL)


@pytest.mark.parametrize("name", TRUTH)
def test_an_export_is_read_as_quark_wrote_it(name: str, checkpoints: Any, run: Run) -> None:
    truth = TRUTH[name]
    inspection = inspect_checkpoint(checkpoints(name))
    description = inspection.description

    assert inspection.scheme == truth["scheme"]
    counts = inspection.to_json()["linear"]
    members = [description.stored.linears.get(name) for name in description.topology.members]
    routed = [form for form in members if form is not None]
    assert counts["int8"] + sum(form.quantized for form in routed) == truth["int8"]
    assert counts["unquantized"] + sum(form.is_float for form in routed) == truth["unquantized"]
    neither = [form for form in description.stored.linears.values() if not form.quantized and not form.is_float]
    assert len(neither) == truth["otherwise"]
    assert sorted(found(inspection)) == sorted(FINDINGS.get(name, []))

    expected = int(any(severity == "error" for severity, *_ in FINDINGS.get(name, [])))
    assert run(checkpoints(name)).code == expected


@pytest.mark.parametrize("name", FIXTURE_SCHEMES)
def test_a_fixture_is_read_as_in_the_table(name: str, checkpoints: Any, run: Run) -> None:
    inspection = inspect_checkpoint(checkpoints(name))
    assert inspection.scheme == FIXTURE_SCHEMES[name]
    assert sorted(found(inspection)) == sorted(FINDINGS.get(name, []))
    assert run(checkpoints(name)).code == int("left_bf16" in name or "moe-bf16" in name)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("qwen3_moe-quark0.13-f2f", ([0, 1, 2], 8, 3, 128, 96, "per_expert")),
        ("deepseek_v3-quark0.13-f2f", ([1, 2], 8, 4, 128, 80, "per_expert")),
        ("step3p5-like-3key_fused", ([1, 2], 6, 2, 128, 80, "stacked")),
        ("mixtral-quark0.13-eager-experts_left_bf16", ([0, 1, 2], 6, 2, 128, 176, "fused")),
        ("deepseek_v3-0.13-f2f-mtp", ([1, 2], 4, 2, 64, 40, "per_expert")),
        ("qwen3_5_moe-0.13-f2f-language_model", ([0, 1, 2], 4, 2, 64, 32, "per_expert")),
        ("qwen3_moe-0.13-f2f-wrapped", ([0, 1], 4, 2, 64, 48, "per_expert")),
        ("qwen3-0.13-f2f-dense", None),
    ],
)
def test_the_experts_are_described(name: str, expected: tuple[Any, ...] | None, checkpoints: Any) -> None:
    moe = inspect_checkpoint(checkpoints(name)).to_json()["moe"]
    keys = ("layers", "experts", "top_k", "hidden_size", "intermediate_size", "layout")
    assert (moe and tuple(moe[key] for key in keys)) == expected


# --json

KEYS: dict[str, type | tuple[type, ...]] = {
    "schema": str, "model": str, "quant_method": (str, type(None)), "producer_version": (str, type(None)),
    "scheme": (str, type(None)), "declared": (dict, type(None)), "weight": (dict, type(None)),
    "activation": (dict, type(None)), "moe": (dict, type(None)), "linear": dict, "tensors": int, "bytes": int,
    "shards": int, "findings": list, "targets": dict, "engines": list,
}  # fmt: skip
SPEC = {"dtype": str, "granularity": str, "symmetric": bool, "dynamic": bool}
MOE = {
    "layers": list, "experts": int, "top_k": (int, type(None)), "hidden_size": int, "intermediate_size": int,
    "layout": str, "activation_function": (str, type(None)),
}  # fmt: skip
FINDING = {"severity": str, "code": str, "subject": str, "count": int, "message": str, "hint": str}
ENGINE = {"engine": str, "version": str, "as": str, "verdict": str, "note": str}


def has(value: dict[str, Any], keys: dict[str, Any]) -> None:
    """Exactly these keys, of these types; a boolean is not a number."""
    assert list(value) == list(keys)
    for key, kind in keys.items():
        assert isinstance(value[key], kind), key
        assert kind is bool or not isinstance(value[key], bool), key


@pytest.mark.parametrize("name", ALL)
def test_json_is_as_in_the_contract(name: str, checkpoints: Any, run: Run) -> None:
    path = checkpoints(name)
    result = run(path, "--json")
    value = result.json
    assert result.err == ""
    assert result.code == int(any(item["severity"] == "error" for item in value["findings"]))

    has(value, KEYS)
    assert (value["schema"], value["model"]) == ("quarkconv.inspect/1", str(path))
    for spec in (value["weight"], value["activation"], *(value["declared"] or {}).values()):
        if spec is not None:
            has(spec, SPEC)
    if value["declared"] is not None:
        assert list(value["declared"]) == ["weight", "activation"]
    if value["moe"] is not None:
        has(value["moe"], MOE)
        assert all(type(layer) is int for layer in value["moe"]["layers"])
        assert value["moe"]["layout"] in {"per_expert", "stacked", "fused"}
    has(value["linear"], {"int8": int, "unquantized": int})
    for item in value["findings"]:
        has(item, FINDING)
        assert item["severity"] in {"error", "warning", "info"}
        assert item["code"] in CODES
        assert item["message"]
    assert "fused-int8" in value["targets"]
    for target in value["targets"].values():
        lost = {"findings": list} if "findings" in target else {}
        right = {"bytes": int, **lost} if target["supported"] else {"reason": str}
        has(target, {"supported": bool, **right})
    for item in value["engines"]:
        has(item, ENGINE)

    files = sorted(path.glob("*.safetensors"))
    assert value["shards"] == len(files)
    sizes = [file.stat().st_size - 8 - int.from_bytes(file.read_bytes()[:8], "little") for file in files]
    assert value["bytes"] == sum(sizes)


def test_json_describes_the_example(checkpoints: Any, run: Run) -> None:
    path = checkpoints("qwen3_moe-quark0.13-f2f")
    value = run(path, "--json").json
    weight = {"dtype": "int8", "granularity": "per_channel", "symmetric": True, "dynamic": False}
    activation = {"dtype": "int8", "granularity": "per_token", "symmetric": True, "dynamic": True}
    index = json.loads((path / "model.safetensors.index.json").read_text())
    assert (value["quant_method"], value["producer_version"], value["scheme"]) == ("quark", "0.13", "ptpc_int8")
    assert value["declared"] == {"weight": weight, "activation": activation}
    assert (value["weight"], value["activation"]) == (weight, activation)
    assert value["moe"] == {
        "layers": [0, 1, 2], "experts": 8, "top_k": 3, "hidden_size": 128, "intermediate_size": 96,
        "layout": "per_expert", "activation_function": "silu",
    }  # fmt: skip
    assert value["linear"] == {"int8": 12, "unquantized": 4}
    assert value["tensors"] == len(index["weight_map"])
    assert value["findings"] == []
    assert value["targets"]["fused-int8"]["supported"] is True


def test_json_describes_a_static_scheme(checkpoints: Any, run: Run) -> None:
    value = run(checkpoints("qwen3_moe-quark0.11-eager-int8_static"), "--json").json
    spec = {"dtype": "int8", "granularity": "per_tensor", "symmetric": True, "dynamic": False}
    assert (value["weight"], value["activation"]) == (spec, spec)


def test_a_module_declared_and_not_stored_does_not_make_the_scheme(tmp_path: Path, run: Run) -> None:
    """``weight`` is what is stored, ``declared`` what the config says."""
    model = Model()
    model.quantization["global_quant_config"] = layer_config({**WEIGHT, "qscheme": "per_tensor"}, STATIC_INPUT)
    value = run(model.write(tmp_path), "--json").json
    assert value["declared"]["weight"]["granularity"] == "per_tensor"
    assert value["weight"]["granularity"] == "per_channel"
    assert {item["code"] for item in value["findings"]} >= {"granularity-mismatch", "scale-missing"}


def test_a_stored_input_scale_makes_the_scheme_static(tmp_path: Path) -> None:
    model = Model()
    for shard in model.shards:
        for name in [name for name in shard if name.endswith(".weight_scale")]:
            shard[name] = torch.tensor(0.5)
            shard[name.replace(".weight_scale", ".input_scale")] = torch.tensor(0.5)
    assert inspect_checkpoint(model.write(tmp_path)).scheme == "int8_static"


def test_one_module_of_no_int8_scheme_leaves_the_model_without_one(tmp_path: Path) -> None:
    model = Model()
    model.quantization["layer_quant_config"] = {"*layers.1.*o_proj": layer_config(inputs=None)}
    inspection = inspect_checkpoint(model.write(tmp_path))
    assert inspection.scheme is None
    assert found(inspection) == [("error", "scheme-unsupported", "quantization_config", 1)]


# For people


@pytest.mark.parametrize("name", ALL)
def test_people_see_every_finding(name: str, checkpoints: Any, run: Run) -> None:
    result = run(checkpoints(name))
    assert result.err == ""
    assert "\x1b" not in result.out
    for _, code, subject, _ in FINDINGS.get(name, []):
        assert code in result.out
        assert subject in result.out
    for code in CODES.keys() - {code for _, code, _, _ in FINDINGS.get(name, [])}:
        assert f" {code} " not in result.out
    assert "fused-int8" in result.out
    assert ("\n  experts " in result.out) is ("dense" not in name)
    if result.code == 0:
        assert len(result.out.splitlines()) < 40, "a screen of 100 x 40, with the prompt below"


def test_the_verdict_comes_first_with_the_parts_not_checked(checkpoints: Any, run: Run) -> None:
    path = checkpoints("qwen3_moe-quark0.13-f2f")
    lines = run(path).out.splitlines()
    assert lines[3].startswith("✓ Config and tensors agree")
    assert lines[4].strip() == "not checked: scales and zero points (--deep reads them)"
    assert lines[5].strip().startswith("vLLM 0.28 - 0.33 runs it in int8 as it is")
    deep = run(path, "--deep").out
    assert "✓ Sound: config, tensors, scales and zero points agree" in deep
    assert "not checked" not in deep


def test_findings_of_one_code_are_shown_as_one_unless_all_are_requested(checkpoints: Any, run: Run) -> None:
    path = checkpoints("mixtral-quark0.13-eager-experts_left_bf16")
    assert run(path).out.count("experts-not-quantized  ") == 1
    assert run(path, "--all").out.count("experts-not-quantized  ") == 3


def test_the_working_directory_is_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run: Run) -> None:
    monkeypatch.chdir(Model().write(tmp_path))
    assert run("--json").json["model"] == "."
    assert run("--json").code == 0


# Failures


def test_damage_is_described_and_gives_1(tmp_path: Path, run: Run) -> None:
    folder = Model().write(tmp_path)
    (folder / SECOND).unlink()
    value = run(folder, "--json").json
    assert [item["code"] for item in value["findings"]] == ["shard-missing"]
    assert (value["scheme"], value["shards"], value["moe"]["layers"]) == ("ptpc_int8", 1, [0])
    assert value["targets"]["fused-int8"]["supported"] is False
    assert run(folder).code == 1
