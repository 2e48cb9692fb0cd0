"""What users of quantized mixtures of experts reported, rebuilt small, each with the right answer."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from support.model import FIRST, SECOND, Model, experts, int8_linear
from support.moe_model import INDEX
from support.quark_config import TENSOR_WEIGHT, layer_config

from quarkconv import QuarkconvError, convert_checkpoint, inspect_checkpoint, plan_conversion, verify_checkpoint
from quarkconv.description.description import describe
from quarkconv.findings import Finding, Severity
from quarkconv.targets import TARGETS

QUANTIZED: Final = tuple(name for name in TARGETS if name != "bf16")
FP8: Final = {**TENSOR_WEIGHT, "dtype": "fp8_e4m3"}
GATES: Final = tuple(f"model.layers.{layer}.mlp.gate" for layer in range(2))
ATTENTION: Final = "model.layers.0.self_attn"


def load(folder: Path) -> dict[str, torch.Tensor]:
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    return found


def load_shard(path: Path) -> dict[str, torch.Tensor]:
    with safe_open(path, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict


def codes(folder: Path) -> dict[str, Severity]:
    """Code -> severity of the findings, those that only inform left out."""
    return {item.code: item.severity for item in inspect_checkpoint(folder).findings if item.severity != "info"}


def finding(folder: Path, code: str) -> Finding:
    return next(item for item in inspect_checkpoint(folder).findings if item.code == code)


def losses(folder: Path, target: str) -> dict[str, list[str]]:
    """Code -> subjects of what a conversion reports."""
    found: dict[str, list[str]] = {}
    for item in plan_conversion(folder, target).losses:
        found.setdefault(item.code, []).append(item.subject)
    return found


def refusal(folder: Path, target: str) -> QuarkconvError:
    with pytest.raises(QuarkconvError) as caught:
        plan_conversion(folder, target)
    return caught.value


def ignored(folder: Path) -> list[str]:
    quantization = json.loads((folder / "config.json").read_text())["quantization_config"]
    found: list[str] = quantization.get("exclude") or quantization["ignore"]
    return found


# Routers and heads in int8, as a script that excludes only lm_head writes them (vLLM 46765)


def int8_routers() -> Model:
    model = Model()
    for gate in GATES:
        for name, tensor in int8_linear(gate, 3, 8).items():
            model.set(name, tensor)
    model.quantization["exclude"] = ["lm_head"]
    return model


def test_int8_routers_are_an_error(tmp_path: Path) -> None:
    found = finding(int8_routers().write(tmp_path), "float-module-quantized")
    assert (found.severity, found.count, found.subject) == ("error", 2, GATES[0])


@pytest.mark.parametrize("target", TARGETS)
def test_conversion_dequantizes_routers_with_one_rounding(target: str, tmp_path: Path) -> None:
    source = int8_routers().write(tmp_path / "source")
    before, out = load(source), convert_checkpoint(source, target, tmp_path / "out").output
    after = load(out)
    for gate in GATES:
        exact = before[f"{gate}.weight"].double() * before[f"{gate}.weight_scale"].double()[:, None]
        assert torch.equal(after[f"{gate}.weight"], exact.float().bfloat16())
        assert f"{gate}.weight_scale" not in after
    if target != "bf16":
        assert losses(source, target)["module-dequantized"] == [GATES[0]]
    if target not in ("bf16", "ascend"):
        assert set(GATES) <= set(ignored(out))
    if target != "bf16":
        assert "float-module-quantized" not in codes(out)
    plan = plan_conversion(source, target)
    assert inspect_checkpoint(source).targets[target].nbytes == plan.tensor_bytes


def test_a_float_router_that_the_config_declares_quantized_is_no_error(tmp_path: Path) -> None:
    model = Model()
    model.quantization["exclude"] = []
    assert codes(model.write(tmp_path)) == {}


# Scales of the key-value cache, of queries and of attention probabilities


def kv_scales(*names: str) -> Model:
    """Outputs of these projections in FP8."""
    model = Model()
    layers = {f"*{name}": {**layer_config(), "output_tensors": copy.deepcopy(FP8)} for name in names}
    cached = [f"*{name}" for name in names if name != "q_proj"]
    for name in names:
        model.first |= int8_linear(f"{ATTENTION}.{name}", 8, 8) | {
            f"{ATTENTION}.{name}.output_scale": torch.tensor(0.5)
        }
    model.config["quantization_config"] |= {
        "layer_quant_config": layers,
        "kv_cache_quant_config": {key: layers[key] for key in cached},
        "export": {**model.quantization["export"], "kv_cache_group": cached},
    }
    return model


def with_probabilities() -> Model:
    model = kv_scales("q_proj", "k_proj", "v_proj")
    model.first[f"{ATTENTION}.prob_output_scale"] = torch.tensor(0.25)
    model.quantization["softmax_quant_spec"] = FP8
    return model


def output_scales(folder: Path) -> set[str]:
    ends = ("output_scale", ".k_scale", ".v_scale")
    return {name.removeprefix(f"{ATTENTION}.") for name in load(folder) if name.endswith(ends)}


@pytest.mark.parametrize(
    ("target", "kept"),
    [
        ("fused-int8", {"k_scale", "v_scale"}),
        ("compressed-tensors", {"k_scale", "v_scale"}),
        ("w8a8-int8", set()),
        ("bf16", set()),
        ("quark", {"prob_output_scale", *(f"{name}_proj.output_scale" for name in "qkv")}),
    ],
)
def test_the_scale_of_an_output_goes_where_its_setting_goes(target: str, kept: set[str], tmp_path: Path) -> None:
    source = with_probabilities().write(tmp_path / "source")
    assert codes(source) == {}
    out = convert_checkpoint(source, target, tmp_path / "out").output
    assert output_scales(out) == kept
    lost = losses(source, target)
    assert ("tensor-dropped" in lost) is (len(kept) < 4)
    quantization = json.loads((out / "config.json").read_text()).get("quantization_config", {})
    assert bool(quantization.get("kv_cache_scheme")) is (target in ("fused-int8", "compressed-tensors"))
    if target == "quark":
        assert "setting-dropped" not in lost
        assert quantization["layer_quant_config"]["*q_proj"]["output_tensors"] == FP8


@pytest.mark.parametrize("target", ["fused-int8", "compressed-tensors", "w8a8-int8", "bf16"])
def test_the_cache_of_a_latent_is_left_out_with_its_setting(target: str, tmp_path: Path) -> None:
    source = kv_scales("kv_b_proj").write(tmp_path / "source")
    out = convert_checkpoint(source, target, tmp_path / "out").output
    assert output_scales(out) == set()
    assert "kv_cache" in str(losses(source, target)["setting-dropped"])
    assert "kv_cache_scheme" not in json.loads((out / "config.json").read_text()).get("quantization_config", {})


# Scales that are named after the quantizer (amd/Quark 44)


def named_after_the_quantizer(model: Model) -> Model:
    for shard in model.shards:
        for name in [name for name in shard if name.endswith("_scale")]:
            shard[name.replace("weight_scale", "weight_quantizer.scale")] = shard.pop(name)
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_scales_are_read_under_either_name(target: str, tmp_path: Path) -> None:
    usual, other = Model().write(tmp_path / "usual"), named_after_the_quantizer(Model()).write(tmp_path / "other")
    assert not any("weight_scale" in name for name in load(other))
    assert codes(other) == {"quantizer-names": "warning"}
    expected = load(convert_checkpoint(usual, target, tmp_path / "a").output)
    found = load(convert_checkpoint(other, target, tmp_path / "b").output)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_no_engine_is_said_to_load_scales_named_after_the_quantizer(tmp_path: Path) -> None:
    inspection = inspect_checkpoint(named_after_the_quantizer(Model()).write(tmp_path))
    assert not [row for row in inspection.engines if row.form == "quark"]
    assert all(item.target is not None for item in inspection.advice)


# Channel INT8 without a config, with SGLang's, and in blocks (SGLang 3888)


def bare() -> Model:
    model = Model()
    del model.config["quantization_config"]
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_tensors_that_leave_no_doubt_need_no_config(target: str, tmp_path: Path) -> None:
    source, declared = bare().write(tmp_path / "bare"), Model().write(tmp_path / "declared")
    assert codes(source) == {"scheme-implied": "warning"}
    assert inspect_checkpoint(source).scheme == "ptpc_int8"
    expected = load(convert_checkpoint(declared, target, tmp_path / "a").output)
    found = load(convert_checkpoint(source, target, tmp_path / "b").output)
    assert all(torch.equal(found[name], expected[name]) for name in expected | found)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("weight_scale", torch.tensor(0.5)),
        ("weight_zero_point", torch.zeros(8, dtype=torch.int8)),
        ("input_scale", torch.tensor(0.5)),
    ],
)
def test_tensors_that_leave_a_doubt_need_a_config(name: str, value: torch.Tensor, tmp_path: Path) -> None:
    model = bare()
    model.set(f"{ATTENTION}.o_proj.{name}", value)
    source = model.write(tmp_path)
    assert codes(source)["quant-config-missing"] == "error"
    assert refusal(source, "fused-int8").exit_code == 4


def test_the_config_of_w8a8_int8_is_no_reason_for_errors(tmp_path: Path) -> None:
    model = Model()
    model.config["quantization_config"] = {
        "quant_method": "w8a8_int8", "activation_scheme": "dynamic", "bits": 8, "group_size": -1,
    }  # fmt: skip
    source = model.write(tmp_path)
    assert codes(source) == {}
    assert losses(source, "fused-int8") == {}


@pytest.mark.parametrize("declared", [True, False])
def test_scales_of_blocks_are_unsupported_and_not_missing(declared: bool, tmp_path: Path) -> None:
    model = bare()
    for shard in model.shards:
        for name in [name for name in shard if name.endswith("weight_scale")]:
            del shard[name]
            shard[name + "_inv"] = torch.ones(1, 1)
    if declared:
        model.config["quantization_config"] = {"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}
    source = model.write(tmp_path)
    assert "scale-missing" not in codes(source)
    assert codes(source)["scheme-unsupported"] == "error"
    for target in TARGETS:
        assert refusal(source, target).exit_code == 4
    with pytest.raises(QuarkconvError, match="cannot be verified") as caught:
        verify_checkpoint(source, device="cpu")
    assert caught.value.exit_code == 4


# Rotations that are computed at run time


def rotated() -> Model:
    model = Model()
    for expert in range(3):
        model.first[f"model.layers.0.mlp.experts.{expert}.down_proj.input_rotation"] = torch.ones(
            4, 4, dtype=torch.int8
        )
    model.quantization["algo_config"] = [{"name": "rotation", "r1": False, "r4": True, "online_r1_rotation": True}]
    return model


@pytest.mark.parametrize("hidden", ["tensors", "setting", "nothing"])
def test_online_rotations_are_an_error_and_converted_to_nothing(hidden: str, tmp_path: Path) -> None:
    model = rotated()
    if hidden == "setting":
        model.quantization["algo_config"] = None
    if hidden == "tensors":
        model.remove(*[name for name in model.first if name.endswith("input_rotation")])
    source = model.write(tmp_path)
    assert codes(source) == {"rotation-online": "error"}
    for target in TARGETS:
        error = refusal(source, target)
        assert (error.exit_code, "rotat" in str(error)) == (4, True)
    assert not [row for row in inspect_checkpoint(source).engines if row.verdict == "int8"]
    result = verify_checkpoint(source, device="cpu")
    assert result.numbers.skipped == "activations are rotated at run time, which the INT8 forward here does not do"
    assert not result.ok


@pytest.mark.parametrize(
    "algorithm", [{"name": "smoothquant", "alpha": 0.5}, {"name": "rotation", "r1": True, "r2": True}]
)
def test_what_is_merged_into_the_weights_is_no_error(algorithm: dict[str, Any], tmp_path: Path) -> None:
    model = Model()
    model.quantization["algo_config"] = [algorithm]
    assert codes(model.write(tmp_path)) == {}


# Layers of multi-token prediction


def with_mtp(layout: str) -> Model:
    """A layer of multi-token prediction in BF16, that the config does not mention."""
    model = Model()
    model.config["mtp_num_hidden_layers"] = 1
    prefix = "mtp.layers.0"
    mtp = {"mtp.norm.weight": torch.ones(8).bfloat16(), f"{prefix}.mlp.gate.weight": torch.rand(3, 8).bfloat16()}
    mtp[f"{prefix}.self_attn.o_proj.weight"] = torch.rand(8, 8).bfloat16()
    if layout == "fused":
        mtp[f"{prefix}.mlp.experts.gate_up_proj"] = torch.rand(3, 8, 8).bfloat16()
        mtp[f"{prefix}.mlp.experts.down_proj"] = torch.rand(3, 8, 4).bfloat16()
    else:
        mtp |= {n: t.bfloat16() for n, t in experts(f"{prefix}.mlp.experts", range(3)).items() if n.endswith("weight")}
    if layout == "fp8":
        mtp = {n: t.to(torch.float8_e4m3fn) if ".experts." in n else t for n, t in mtp.items()}
    model.second |= mtp
    return model


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("target", QUANTIZED)
def test_own_output_with_float_layers_of_prediction_has_no_errors(target: str, layout: str, tmp_path: Path) -> None:
    source = with_mtp(layout).write(tmp_path / "source")
    assert codes(source)["experts-not-quantized"] == "error"
    assert "--mtp drop" in finding(source, "experts-not-quantized").hint
    out = convert_checkpoint(source, target, tmp_path / "out").output
    assert inspect_checkpoint(out).ok
    assert verify_checkpoint(out, device="cpu", stages=("bytes",)).ok


@pytest.mark.parametrize("layout", ["fused", "split", "fp8"])
def test_layers_of_prediction_can_be_left_out(layout: str, tmp_path: Path) -> None:
    plain = Model().write(tmp_path / "plain")
    source = with_mtp(layout).write(tmp_path / "source")
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out", mtp="drop").output
    expected = load(convert_checkpoint(plain, "fused-int8", tmp_path / "expected").output)
    found = load(out)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert json.loads((out / "config.json").read_text())["mtp_num_hidden_layers"] == 0
    plan = plan_conversion(source, "fused-int8", mtp="drop")
    assert [item.count for item in plan.losses if item.code == "mtp-dropped"] == [
        len(with_mtp(layout).second) - len(Model().second)
    ]
    assert verify_checkpoint(out, device="cpu", stages=("bytes",)).ok


@pytest.mark.parametrize("layout", ["fused", "split"])
@pytest.mark.parametrize("target", QUANTIZED)
def test_layers_of_prediction_can_be_quantized(target: str, layout: str, tmp_path: Path) -> None:
    source = with_mtp(layout).write(tmp_path / "source")
    out = convert_checkpoint(source, target, tmp_path / "out", mtp="quantize").output
    assert inspect_checkpoint(out).ok
    assert all(layer.quantized for layer in describe(out).moe_layers)
    before, after = load(source), load(out)
    name = "mtp.layers.0.self_attn.o_proj.weight"
    scale = after[f"{name}_scale"].flatten()[:, None]
    errors = (after[name].double() * scale.double() - before[name].double()).abs()
    assert bool((errors <= 0.5000001 * scale.double()).all())  # half a step of 8 bits
    assert after["mtp.layers.0.mlp.gate.weight"].dtype == torch.bfloat16
    assert verify_checkpoint(out, device="cpu", stages=("bytes",)).ok


def test_a_layer_of_prediction_that_the_config_has_and_nothing_stores_is_named(tmp_path: Path) -> None:
    model = Model()
    model.config["num_nextn_predict_layers"] = 1
    assert finding(model.write(tmp_path), "mtp-missing").subject == "config.json"
    for name, tensor in experts("model.layers.2.mlp.experts", range(3)).items():
        model.second[name] = tensor
    assert "mtp-missing" not in [item.code for item in inspect_checkpoint(model.write(tmp_path)).findings]


def test_fp8_beside_int8_is_unsupported_and_the_option_is_named(tmp_path: Path) -> None:
    source = with_mtp("fp8").write(tmp_path)
    for target in TARGETS:
        error = refusal(source, target)
        assert error.exit_code == 4
        assert "--mtp drop" in (error.hint or "")


# Two stacks of experts (vllm-omni 5573)


def two_stacks() -> Model:
    model = Model()
    shape = {"num_hidden_layers": 2, "num_experts_per_tok": 2, "hidden_act": "silu"}
    for shard in model.shards:
        for name in list(shard):
            shard[f"thinker.{name}"] = shard.pop(name)
    model.second |= experts("talker.model.layers.0.mlp.experts", range(2), hidden=8, intermediate=6)
    model.config = {
        "model_type": "qwen3_omni_moe",
        "thinker_config": {"text_config": {"model_type": "qwen3_omni_moe_text", "num_experts": 3, **shape}},
        "talker_config": {"text_config": {"model_type": "qwen3_omni_moe_talker_text", "num_experts": 2, **shape}},
        "quantization_config": model.quantization,
    }
    return model


def test_each_stack_is_compared_with_its_own_config(tmp_path: Path) -> None:
    model = two_stacks()
    assert "expert-count" not in codes(model.write(tmp_path / "a"))
    model.config["talker_config"]["text_config"]["num_experts"] = 3
    found = finding(model.write(tmp_path / "b"), "expert-count")
    assert (found.subject, found.severity) == ("talker.model.layers.0.mlp.experts", "error")


def test_the_language_model_comes_first_and_layers_have_the_names_of_modules(tmp_path: Path) -> None:
    moe = inspect_checkpoint(two_stacks().write(tmp_path)).to_json()["moe"]
    prefixes = ["thinker.model.layers.0", "thinker.model.layers.1", "talker.model.layers.0"]
    assert moe["layers"] == [f"{prefix}.mlp.experts" for prefix in prefixes]
    assert (moe["experts"], moe["intermediate_size"]) == (3, 4)


# An index that leaves out files, or names files that do not exist


def test_a_file_that_the_index_does_not_name_is_reported_by_convert(tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    save_file({"mtp.norm.weight": torch.ones(8)}, source / "model-mtp.safetensors")
    assert codes(source) == {"file-unused": "warning"}
    for target in TARGETS:
        assert losses(source, target)["file-unused"] == ["model-mtp.safetensors"]


def test_a_file_that_the_index_does_not_name_is_reported_by_verify(tmp_path: Path) -> None:
    source = Model().write(tmp_path / "source")
    save_file({"mtp.norm.weight": torch.ones(8)}, source / "model-mtp.safetensors")
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    for result in (verify_checkpoint(source, device="cpu"), verify_checkpoint(out, source, device="cpu")):
        assert result.ok
        assert [(item.code, item.subject) for item in result.findings] == [("file-unused", "model-mtp.safetensors")]
        assert result.to_json()["findings"][0]["subject"] == "model-mtp.safetensors"
    assert verify_checkpoint(out, device="cpu").findings == ()


def test_verify_calls_an_index_without_its_files_damaged(tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    index = json.loads((source / INDEX).read_text())
    stale = {name: file.replace("of-00002", "of-00004") for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps({"weight_map": stale}))
    with pytest.raises(QuarkconvError, match="shard-missing") as caught:
        verify_checkpoint(source, device="cpu")
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("fault", ["unlisted tensor", "tensor in two files", "no index"])
def test_an_index_that_disagrees_with_its_files_is_found_by_every_command(fault: str, tmp_path: Path) -> None:
    model = Model()
    source = model.write(tmp_path / "source")
    if fault == "unlisted tensor":
        save_file({**load_shard(source / FIRST), "extra.weight": torch.ones(2, 2)}, source / FIRST)
    if fault == "tensor in two files":
        name = next(iter(model.second))
        save_file({**load_shard(source / FIRST), name: model.second[name]}, source / FIRST)
    if fault == "no index":
        (source / INDEX).unlink()
        assert codes(source) == {}
        assert convert_checkpoint(source, "fused-int8", tmp_path / "out").output.is_dir()
        assert verify_checkpoint(source, device="cpu").ok
        return
    code = {"unlisted tensor": "index-mismatch", "tensor in two files": "tensor-duplicate"}[fault]
    assert codes(source)[code] == "error"
    assert refusal(source, "fused-int8").exit_code == 3
    result = verify_checkpoint(source, device="cpu")
    assert code in result.problems[0].message
    assert result.numbers.skipped == "the structure is broken"


def test_a_stale_index_is_named_and_nothing_is_concluded_from_what_it_hides(tmp_path: Path) -> None:
    source = Model().write(tmp_path)
    index = json.loads((source / INDEX).read_text())
    stale = {name: file.replace("of-00002", "of-00004") for name, file in index["weight_map"].items()}
    (source / INDEX).write_text(json.dumps({"weight_map": stale}))
    assert codes(source) == {"shard-missing": "error", "file-unused": "warning"}
    assert FIRST in finding(source, "shard-missing").hint
    error = refusal(source, "fused-int8")
    assert (error.exit_code, SECOND in (error.hint or "") or FIRST in (error.hint or "")) == (3, True)


# Model types that no engine was run with


@pytest.mark.parametrize("model_type", ["jamba", "kimi_k25", "a_type_of_tomorrow", None])
def test_an_engine_has_no_verdict_on_a_model_type_it_did_not_run(model_type: str | None, tmp_path: Path) -> None:
    model = Model()
    model.config |= {"model_type": model_type}
    inspection = inspect_checkpoint(model.write(tmp_path))
    assert {row.verdict for row in inspection.engines} >= {"not checked"}
    assert not {row.verdict for row in inspection.engines} & {"int8", "w8a16"}
    assert all("not checked" in item.text for item in inspection.advice)


@pytest.mark.parametrize("model_type", ["glm4_moe_lite", "glm_moe_dsa", "deepseek_v32"])
def test_classes_that_refuse_fused_experts_are_known(model_type: str, tmp_path: Path) -> None:
    model = Model()
    model.config |= {"model_type": model_type}
    rows = inspect_checkpoint(model.write(tmp_path)).engines
    assert {row.verdict for row in rows if (row.engine, row.form) == ("vllm", "fused-int8")} == {"fails"}


def test_a_wrapper_around_a_known_language_model_is_another_model_type(tmp_path: Path) -> None:
    model = Model()
    quantization = model.config.pop("quantization_config")
    model.config = {"model_type": "internvl", "llm_config": model.config, "quantization_config": quantization}
    assert not {row.verdict for row in inspect_checkpoint(model.write(tmp_path)).engines} & {"int8", "w8a16"}


def test_sound_needs_a_known_model_type(tmp_path: Path) -> None:
    known = inspect_checkpoint(Model().write(tmp_path / "known"), deep=True)
    model = Model()
    model.config["model_type"] = "a_type_of_tomorrow"
    unknown = inspect_checkpoint(model.write(tmp_path / "unknown"), deep=True)
    assert known.headline.startswith("Sound")
    assert not unknown.headline.startswith("Sound")
    assert "a_type_of_tomorrow" in str(unknown.not_checked)


# What convert wrote, verify accepts


def excluded_experts() -> Model:
    model = Model()
    model.to_float("model.layers.1.mlp.experts")
    model.quantization["exclude"] += ["model.layers.1.mlp.experts.*"]
    return model


VARIANTS: Final[dict[str, Callable[[], Model]]] = {
    "plain": Model,
    "int8 routers": int8_routers,
    "quantized outputs": with_probabilities,
    "names of the quantizer": lambda: named_after_the_quantizer(Model()),
    "no config": bare,
    "fused layer of prediction": lambda: with_mtp("fused"),
    "layer of prediction": lambda: with_mtp("split"),
    "excluded experts": excluded_experts,
    "two stacks": two_stacks,
}


@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_config_and_tensors_of_every_output_agree(variant: str, target: str, tmp_path: Path) -> None:
    source = VARIANTS[variant]().write(tmp_path / "source")
    out = convert_checkpoint(source, target, tmp_path / "out").output
    blocked = {"not-moe", "quant-config-missing"} if target == "bf16" else set()
    errors = {item.code for item in describe(out).errors()} - blocked
    assert errors == set()
    assert verify_checkpoint(out, device="cpu", stages=("bytes",)).ok
