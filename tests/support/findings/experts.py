"""Experts that are missing, in float, of other sizes or under other names."""

from __future__ import annotations

from typing import Final

import torch

from support.findings import EXPERTS, LATER, Case, in_float, remove, rename, set_tensor
from support.model import Model, experts, int8_linear


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


def resize_layer(model: Model) -> None:
    model.second |= experts(LATER, range(3), intermediate=6)


def wrap(model: Model) -> None:
    for shard in model.shards:
        for name in list(shard):
            shard[f"module.{name}"] = shard.pop(name)
    model.quantization["exclude"] = ["*lm_head", "*mlp.gate"]


def shorten_names(model: Model) -> None:
    for old in ("up_proj", "gate_proj", "down_proj"):
        rename(model, f".{old}.", f".{old[0]}_proj.")


def widen_expert(model: Model) -> None:
    model.first |= int8_linear(f"{EXPERTS}.2.up_proj", 5, 8)


CASES: Final = (
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
        "a shared expert after the routed ones",
        (
            ("error", "shared-among-routed", EXPERTS, 1),
            ("error", "shared-among-routed", LATER, 1),
            ("warning", "config-mismatch", "model.layers.0.mlp", 2),
        ),
        lambda model: model.config.update(num_experts=2, n_shared_experts=1),
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
        (
            ("warning", "config-mismatch", "model.layers.0.mlp", 2),
            ("warning", "config-mismatch", "model.layers.0.input_layernorm.weight", 2),
            ("warning", "config-mismatch", "model.embed_tokens", 1),
        ),
        lambda model: model.config.update(hidden_size=16),
    ),
    Case(
        "no router",
        (("warning", "router-mismatch", "model.layers.0.mlp.gate.weight", 1),),
        lambda model: model.remove("model.layers.0.mlp.gate."),
    ),
    Case(
        "biases of norms",
        (("warning", "norm-biases", "model.layers.0.input_layernorm.bias", 1),),
        lambda model: model.set("model.layers.0.input_layernorm.bias", torch.zeros(8)),
    ),
    Case(
        "names below a wrapper",
        (("warning", "wrapped-names", f"module.{EXPERTS}", 2),),
        wrap,
    ),
    Case("a layer of other size", (("info", "layer-geometry", LATER, 1),), resize_layer),
    Case(
        "experts under other names",
        (("error", "experts-not-understood", f"{EXPERTS}.0.d_proj", 18),),
        shorten_names,
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
    Case(
        "names of transformers' classes, which engines do not know",
        (("warning", "expert-names", EXPERTS, 2),),
        lambda model: model.config.update(model_type="mixtral"),
    ),
)
