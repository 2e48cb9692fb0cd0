"""Small checkpoints as users reported them, and what inspect and convert report about them."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from safetensors import safe_open

from quarkconv import QuarkconvError, inspect_checkpoint, plan_conversion
from quarkconv.findings import Finding, Severity
from quarkconv.targets import TARGETS
from support.model import Model, experts, int8_linear
from support.quark_config import TENSOR_WEIGHT, layer_config

QUANTIZED: Final = tuple(name for name in TARGETS if name != "bf16")
FP8: Final = {**TENSOR_WEIGHT, "dtype": "fp8_e4m3"}
GATES: Final = tuple(f"model.layers.{layer}.mlp.gate" for layer in range(2))
ATTENTION: Final = "model.layers.0.self_attn"
FP8_ATTENTION: Final = tuple(f"{ATTENTION}.{name}_proj" for name in "qkvo")
FP8_BLOCKS: Final = f"{ATTENTION}.q_b_proj"
PREDICTION: Final = "mtp.layers.0.mlp.experts"


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


def compressed_tensors(ignore: list[str]) -> dict[str, Any]:
    """The config of a model in ptpc_int8; heads and routers are ignored, and more modules."""
    arguments = {"num_bits": 8, "type": "int", "symmetric": True}
    group = {
        "targets": ["Linear"],
        "weights": {**arguments, "strategy": "channel", "dynamic": False},
        "input_activations": {**arguments, "strategy": "token", "dynamic": True},
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "config_groups": {"group_0": group},
        "ignore": ["lm_head", "re:.*mlp.gate$", *ignore],
    }


def int8_routers() -> Model:
    model = Model()
    for gate in GATES:
        for name, tensor in int8_linear(gate, 3, 8).items():
            model.set(name, tensor)
    model.quantization["exclude"] = ["lm_head"]
    return model


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


def named_after_the_quantizer(model: Model) -> Model:
    for shard in model.shards:
        for name in [name for name in shard if name.endswith("_scale")]:
            shard[name.replace("weight_scale", "weight_quantizer.scale")] = shard.pop(name)
    return model


def with_scales_named_inv(model: Model, shape: tuple[int, ...]) -> Model:
    """Scales of rows in a shape, under the name of scales of blocks."""
    for shard in model.shards:
        for name in [name for name in shard if name.endswith("weight_scale")]:
            shard[f"{name}_inv"] = shard.pop(name).reshape(shape)
    return model


def bare() -> Model:
    model = Model()
    del model.config["quantization_config"]
    return model


def rotated() -> Model:
    model = Model()
    for expert in range(3):
        model.first[f"model.layers.0.mlp.experts.{expert}.down_proj.input_rotation"] = torch.ones(
            4, 4, dtype=torch.int8
        )
    model.quantization["algo_config"] = [{"name": "rotation", "r1": False, "r4": True, "online_r1_rotation": True}]
    return model


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


def fp8_layer(*, per_channel: bool, static: bool) -> dict[str, Any]:
    """A Quark layer config in FP8."""
    layer = copy.deepcopy(layer_config())
    if not per_channel:
        layer["weight"] = copy.deepcopy(TENSOR_WEIGHT)
    if static:
        layer["input_tensors"] = copy.deepcopy(TENSOR_WEIGHT)
    for part in ("weight", "input_tensors"):
        layer[part]["dtype"] = "fp8_e4m3"
    return layer


def with_fp8_attention(*, per_channel: bool = True, static: bool = False) -> Model:
    """The attention of the first layer in FP8, that of the second in BF16."""
    model, random = Model(), torch.Generator().manual_seed(1)
    model.to_float("model.layers.1.self_attn")
    model.quantization["exclude"].append("model.layers.1.self_attn.o_proj")
    for module in FP8_ATTENTION:
        weight = torch.randn(8, 8, generator=random)
        scale = (weight.abs().amax(1) if per_channel else weight.abs().amax()) / torch.finfo(torch.float8_e4m3fn).max
        codes = weight / (scale[:, None] if per_channel else scale)
        model.set(f"{module}.weight", codes.to(torch.float8_e4m3fn))
        model.set(f"{module}.weight_scale", scale.bfloat16())
        if static:
            model.set(f"{module}.input_scale", torch.tensor(0.25))
    model.quantization["layer_quant_config"] = {
        "*layers.0.self_attn*": fp8_layer(per_channel=per_channel, static=static)
    }
    return model


def to_blocks(model: Model, module: str, rows: int, columns: int) -> None:
    """Store a linear in FP8 with scales of blocks of 128 x 128."""
    random = torch.Generator().manual_seed(2)
    blocks = torch.rand(-(-rows // 128), -(-columns // 128), generator=random) + 0.5
    model.set(f"{module}.weight", torch.randn(rows, columns, generator=random).to(torch.float8_e4m3fn))
    model.set(f"{module}.weight_scale_inv", blocks)


def with_fp8_blocks(*, prediction: bool = False) -> Model:
    """A linear of the attention in FP8, and, if requested, a layer of multi-token prediction."""
    model = Model()
    to_blocks(model, FP8_BLOCKS, 200, 130)
    if prediction:
        model.config["mtp_num_hidden_layers"] = 1
        model.set("mtp.layers.0.mlp.gate.weight", torch.rand(3, 8).bfloat16())
        for expert in range(3):
            for leaf, rows, columns in (("gate_proj", 4, 8), ("up_proj", 4, 8), ("down_proj", 8, 4)):
                to_blocks(model, f"{PREDICTION}.{expert}.{leaf}", rows, columns)
    return model


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


def excluded_experts() -> Model:
    model = Model()
    model.to_float("model.layers.1.mlp.experts")
    model.quantization["exclude"] += ["model.layers.1.mlp.experts.*"]
    return model
