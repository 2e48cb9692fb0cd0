"""INT8 of other tools, and files beside the model: unsupported and named, not called damaged or run."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors.torch import save_file
from support.model import Model, int8_linear
from support.moe_model import INDEX
from support.quark_config import TENSOR_WEIGHT, layer_config
from support.raw import write_json
from support.reported import codes, finding, load, losses, refusal

from quarkconv import UnsupportedError, convert_checkpoint, inspect_checkpoint, verify_checkpoint
from quarkconv.targets import TARGETS

EXPERTS: Final = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(2))


def with_scales_named(name: Callable[[str], str], factor: float = 1.0, **quantization: Any) -> Model:
    """A model whose scales have other names, times a factor."""
    model = Model()
    for shard in model.shards:
        for scale in [scale for scale in shard if scale.endswith(".weight_scale")]:
            shard[name(scale.removesuffix(".weight_scale"))] = shard.pop(scale) * factor
    if quantization:
        model.config["quantization_config"] = quantization
    return model


def fused_with_scales_named(leaf: str) -> Model:
    """A model whose experts are fused, [E, 2I, H] and [E, H, I], with the scales under ``leaf``."""
    model = Model()
    tensors = model.first | model.second
    for prefix in EXPERTS:
        shard = model.shard(f"{prefix}.0.up_proj.weight")
        for kind, suffix in (("weight", ""), ("weight_scale", leaf)):
            of = {name: [tensors[f"{prefix}.{e}.{name}.{kind}"] for e in range(3)] for name in ("gate_proj", "up_proj")}
            gate_up = [torch.cat(pair) for pair in zip(of["gate_proj"], of["up_proj"], strict=True)]
            down = [tensors[f"{prefix}.{e}.down_proj.{kind}"] for e in range(3)]
            shard[f"{prefix}.gate_up_proj{suffix}"], shard[f"{prefix}.down_proj{suffix}"] = map(
                torch.stack, (gate_up, down)
            )
        for expert in range(3):
            model.remove(f"{prefix}.{expert}.")
    return model


RENAMED: Final[dict[str, Callable[[], Model]]] = {
    "bitsandbytes": lambda: with_scales_named("{}.SCB".format, 127.0, quant_method="bitsandbytes", load_in_8bit=True),
    "DeepSeek's inference code": lambda: with_scales_named("{}.scale".format),
    "a scale below the weight": lambda: with_scales_named("{}.weight.scale".format),
    "Mistral's format": lambda: with_scales_named("{}.qscale_weight".format),
    "fused experts": lambda: fused_with_scales_named("_weight_scale"),
}


@pytest.mark.parametrize("variant", RENAMED)
def test_scales_under_unknown_names_are_unsupported_and_not_missing(variant: str, tmp_path: Path) -> None:
    source = RENAMED[variant]().write(tmp_path)
    assert codes(source)["scheme-unsupported"] == "error"
    assert "scale-missing" not in codes(source)
    for target in TARGETS:
        error = refusal(source, target)
        assert (error.exit_code, "may have another name" in str(error)) == (4, True)


def test_an_unknown_method_is_named_beside_scales_of_unknown_names(tmp_path: Path) -> None:
    assert (
        "quant_method bitsandbytes" in finding(RENAMED["bitsandbytes"]().write(tmp_path), "scheme-unsupported").message
    )


def test_a_weight_with_a_bias_alone_lacks_its_scale(tmp_path: Path) -> None:
    model = Model()
    module = f"{EXPERTS[0]}.0.down_proj"
    model.remove(f"{module}.weight_scale")
    model.first |= {f"{module}.bias": torch.zeros(8), f"{module}.input_scale": torch.ones(())}
    assert finding(model.write(tmp_path), "scale-missing").subject == module


def square(axis: int) -> Model:
    """A model whose weights all have as many rows as columns, with scales declared along an axis."""
    model = Model()
    for module in [name.removesuffix(".weight") for s in model.shards for name in s if s[name].dtype == torch.int8]:
        shard = model.shard(f"{module}.weight")
        shard |= int8_linear(module, 8, 8)
    model.config["moe_intermediate_size"] = 8
    model.quantization["global_quant_config"] = copy.deepcopy(layer_config())
    model.quantization["global_quant_config"]["weight"]["ch_axis"] = axis
    return model


@pytest.mark.parametrize("target", TARGETS)
def test_scales_of_columns_are_not_taken_for_scales_of_rows(target: str, tmp_path: Path) -> None:
    error = refusal(square(1).write(tmp_path / "columns"), target)
    assert (error.exit_code, "declares them per column" in str(error)) == (4, True)
    convert_checkpoint(square(0).write(tmp_path / "rows"), target, tmp_path / "out")


def test_experts_that_are_declared_in_fewer_bits_are_unsupported_and_not_damaged(tmp_path: Path) -> None:
    """W4A8 of Ascend: half the rows of each weight."""
    model = Model()
    del model.config["quantization_config"]
    description = {"model_quant_type": "W4A8_DYNAMIC", "version": "1.0.0"}
    for shard in model.shards:
        for name, tensor in shard.items():
            packed = ".experts." in name and name.endswith(".weight")
            shard[name] = tensor[: len(tensor) // 2].clone() if packed else tensor
            int8 = name.removesuffix("_scale").removesuffix(".weight") + ".weight_scale" in shard
            description[name] = "FLOAT" if not int8 else "W4A8_DYNAMIC" if ".experts." in name else "W8A8_DYNAMIC"
    write_json(model.write(tmp_path) / "quant_model_description.json", description)
    assert set(codes(tmp_path)) == {"scheme-unsupported"}
    for target in TARGETS:
        error = refusal(tmp_path, target)
        assert (error.exit_code, "W4A8_DYNAMIC" in str(error)) == (4, True)


def single(folder: Path) -> Path:
    """The model in one file, without an index."""
    model = Model()
    model.write(folder)
    for path in (*folder.glob("model-*"), folder / INDEX):
        path.unlink()
    save_file(model.first | model.second, folder / "model.safetensors")
    return folder


@pytest.mark.parametrize(
    ("write", "extra"),
    [
        (lambda folder: Model().write(folder), "consolidated.safetensors"),
        (single, "consolidated.safetensors"),
        (single, "mtp.safetensors"),
    ],
    ids=["Mistral's format beside shards", "Mistral's format beside one file", "another file beside one"],
)
def test_no_engine_is_said_to_load_shards_beside_files_that_it_loads_instead(
    write: Callable[[Path], Path], extra: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source")
    assert any(fact.form == "quark" and fact.verdict == "int8" for fact in inspect_checkpoint(source).engines)
    save_file({"layers.0.wq.weight": torch.ones(2, 2)}, source / extra)
    inspection = inspect_checkpoint(source, deep=True)
    assert codes(source) == {"file-conflict": "warning"}
    assert not inspection.headline.startswith("Sound")
    assert not any(fact.form == "quark" and fact.verdict == "int8" for fact in inspection.engines)
    assert losses(source, "fused-int8")["file-conflict"] == [extra]
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out").output
    assert not (out / extra).exists()
    assert verify_checkpoint(out, source, device="cpu").verdict() == "Verified"


def test_adapters_inside_the_model_are_named_and_no_engine_is_said_to_run_them(tmp_path: Path) -> None:
    model = Model()
    linear = "model.layers.0.self_attn.o_proj"
    for name in [name for name in model.first if name.startswith(f"{linear}.")]:
        model.first[name.replace("o_proj", "o_proj.base_layer")] = model.first.pop(name)
    model.first |= {
        f"{linear}.lora_A.default.weight": torch.ones(2, 8),
        f"{linear}.lora_B.default.weight": torch.ones(8, 2),
    }
    source = model.write(tmp_path)
    assert codes(source) == {"wrapped-names": "warning"}
    inspection = inspect_checkpoint(source, deep=True)
    assert not inspection.headline.startswith("Sound")
    assert not any(fact.verdict == "int8" for fact in inspection.engines)
    assert "wrapped-names" in losses(source, "compressed-tensors")
    assert sorted(load(source)) == sorted(model.first | model.second)


@pytest.mark.parametrize("zero_point", [0, 5])
def test_static_activations_that_are_declared_asymmetric_are_unsupported(zero_point: int, tmp_path: Path) -> None:
    """As asymmetric weights are: nothing says what a missing zero point would be, and engines read none."""
    model = Model()
    layer = copy.deepcopy(layer_config())
    layer["weight"] = copy.deepcopy(TENSOR_WEIGHT)
    layer["input_tensors"] = {**copy.deepcopy(TENSOR_WEIGHT), "symmetric": False}
    model.quantization["global_quant_config"] = layer
    for shard in model.shards:
        for scale in [name for name in shard if name.endswith(".weight_scale")]:
            module = scale.removesuffix(".weight_scale")
            shard[scale] = torch.tensor(0.01)
            shard[f"{module}.input_scale"] = torch.tensor(0.02)
            shard[f"{module}.input_zero_point"] = torch.tensor(zero_point, dtype=torch.int8)
    source = model.write(tmp_path)
    assert codes(source) == {"scheme-unsupported": "error"}
    error = refusal(source, "fused-int8")
    assert (error.exit_code, "int8 static asymmetric per_tensor activations" in str(error)) == (4, True)


@pytest.mark.parametrize(
    "name", ["model-rank-{}-part-0.safetensors", "model-pp-0-tp-{}-part-0.safetensors", "rank{}.safetensors"]
)
def test_parameters_of_the_ranks_of_an_engine_are_unsupported_and_not_duplicates(name: str, tmp_path: Path) -> None:
    """``save_sharded_state``, TensorRT-LLM: each file has all names, merged and divided, and there is no index."""
    for rank in range(2):
        parameters = {
            "model.layers.0.mlp.experts.w13_weight": torch.zeros(3, 4, 8, dtype=torch.int8),
            "model.layers.0.mlp.experts.w13_weight_scale": torch.ones(3, 4, 1),
            "model.layers.0.self_attn.qkv_proj.weight": torch.zeros(12, 8, dtype=torch.int8),
        }
        save_file(parameters, tmp_path / name.format(rank))
    write_json(tmp_path / "config.json", Model().config)
    found = finding(tmp_path, "format-unsupported")
    assert (found.count, found.subject) == (2, name.format(0))
    for target in TARGETS:
        assert refusal(tmp_path, target).exit_code == 4


@pytest.mark.parametrize("name", ["quant_model_description_w8a8_dynamic.json", "quant_model_description_w8a8.json"])
def test_a_description_of_an_older_msmodelslim_is_named(name: str, tmp_path: Path) -> None:
    """vllm-ascend reads quant_model_description.json only."""
    model = Model()
    del model.config["quantization_config"]
    description = {"model_quant_type": "W8A8_DYNAMIC"}
    for shard in model.shards:
        for tensor in [tensor for tensor in shard if tensor.endswith("_scale")]:
            shard[tensor] = shard[tensor].reshape(-1, 1)
            shard[tensor.replace("_scale", "_offset")] = torch.zeros_like(shard[tensor])
        for tensor in shard:
            is_int8 = shard.get(tensor.rpartition(".")[0] + ".weight_scale") is not None
            description[tensor] = "W8A8_DYNAMIC" if is_int8 else "FLOAT"
    source = model.write(tmp_path)
    write_json(source / name, description)
    assert name in str(refusal(source, "ascend"))
    (source / name).rename(source / "quant_model_description.json")
    assert codes(source) == {}


def in_a_folder(folder: Path, *, listed: bool) -> Path:
    """A model whose shards lie in a folder below config.json, and its index beside config.json or in that folder."""
    root = Model().write(folder)
    (root / "weights").mkdir()
    for shard in root.glob("*.safetensors"):
        shard.rename(root / "weights" / shard.name)
    index = json.loads((root / INDEX).read_text())
    if listed:
        index["weight_map"] = {name: f"weights/{file}" for name, file in index["weight_map"].items()}
        (root / INDEX).write_text(json.dumps(index))
    else:
        (root / INDEX).rename(root / "weights" / INDEX)
    return root


@pytest.mark.parametrize("listed", [True, False])
def test_shards_in_folders_are_unsupported_and_not_damaged(listed: bool, tmp_path: Path) -> None:
    model = in_a_folder(tmp_path / "model", listed=listed)
    assert finding(model, "format-unsupported").count == 2
    assert set(codes(model)) == {"format-unsupported"}
    for target in TARGETS:
        assert isinstance(refusal(model, target), UnsupportedError)
    with pytest.raises(UnsupportedError, match="in subfolders"):
        verify_checkpoint(model)


@pytest.mark.parametrize("file", ["../model-00001-of-00002.safetensors", "a/../../b.safetensors", "/etc/b.safetensors"])
def test_shards_outside_of_the_directory_stay_invalid(file: str, tmp_path: Path) -> None:
    model = Model()
    model.weight_map = dict.fromkeys(model.first | model.second, file)
    assert "index-invalid" in codes(model.write(tmp_path))


def test_a_shared_expert_after_the_routed_ones_is_unsupported_and_not_damaged(tmp_path: Path) -> None:
    model = Model()
    model.config |= {"num_experts": 2, "n_shared_experts": 1}
    source = model.write(tmp_path / "source")
    assert "expert-count" not in codes(source)
    assert finding(source, "shared-among-routed").subject == "model.layers.0.mlp.experts"
    for target in TARGETS:
        assert isinstance(refusal(source, target), UnsupportedError)
    model.set("model.layers.0.mlp.shared_experts.up_proj.weight", torch.zeros(4, 8, dtype=torch.bfloat16))
    assert "expert-count" in codes(model.write(tmp_path / "beside"))
