"""A config that declares something else than is stored."""

from __future__ import annotations

from typing import Final

import torch

from support.findings import EXPERTS, LATER, MIXED, O_PROJ, Case, configure, in_float, set_tensor
from support.model import SECOND, Model, int8_linear
from support.quark_config import TENSOR_WEIGHT, WEIGHT, layer_config


def float8(model: Model) -> None:
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.o_proj.weight"):
        model.set(name, torch.ones(8, 8).to(torch.float8_e4m3fn))


def declared_float8(model: Model) -> None:
    float8(model)
    layer = layer_config()
    model.quantization["layer_quant_config"] = {
        "*o_proj": {**layer, **{part: {**layer[part], "dtype": "fp8_e4m3"} for part in ("weight", "input_tensors")}}
    }


def keep_float_to_quantize_at_load(model: Model) -> None:
    model.quantization["export"]["weight_format"] = "fake_quantized"
    for layer in (0, 1):
        model.set(f"model.layers.{layer}.self_attn.o_proj.weight", torch.rand(8, 8).bfloat16())


def zero_points_undeclared(model: Model) -> None:
    del model.config["quantization_config"]
    model.set(f"{O_PROJ}.weight_zero_point", torch.zeros(8, dtype=torch.int8))


def nothing_quantized(model: Model) -> None:
    model.to_float("model.")
    model.quantization["exclude"] = ["*"]


def per_tensor_attention(model: Model, *, inputs: object = None, stored_input: bool = False) -> None:
    config = layer_config(TENSOR_WEIGHT) if inputs is None else layer_config(TENSOR_WEIGHT, inputs)
    model.quantization["layer_quant_config"] = {"*o_proj": config}
    for layer in (0, 1):
        module = f"model.layers.{layer}.self_attn.o_proj"
        model.set(f"{module}.weight_scale", torch.tensor(0.5))
        if stored_input:
            model.set(f"{module}.input_scale", torch.tensor(0.5))


CASES: Final = (
    Case(
        "a class of another model type",
        (("warning", "class-mismatch", "config.json", 1),),
        lambda model: model.config.update(architectures=["MixtralForCausalLM"]),
    ),
    Case(
        "int8 without quantization_config",
        (("warning", "scheme-implied", "config.json", 1),),
        lambda model: model.config.pop("quantization_config"),
    ),
    Case(
        "int8 with zero points, without quantization_config",
        (("error", "quant-config-missing", "config.json", 1), ("info", "zero-point-present", O_PROJ, 1)),
        zero_points_undeclared,
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
    Case(
        "a part of a merged linear in float",
        (("warning", "merged-mixed", "model.layers.0.self_attn.k_proj", 1),),
        lambda model: (
            model.first.update(int8_linear("model.layers.0.self_attn.q_proj", 8, 8)),
            model.first.update({"model.layers.0.self_attn.k_proj.weight": torch.ones(8, 8).bfloat16()}),
            model.quantization["exclude"].append("model.layers.0.self_attn.k_proj"),
        ),
    ),
    Case(
        "the part of a rank",
        (("warning", "rank-part", "config.json", 1),),
        lambda model: model.config.update(quarkconv_rank={"parallel": "tp", "rank": 0, "world_size": 2}),
    ),
)
