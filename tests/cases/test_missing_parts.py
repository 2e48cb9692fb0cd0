"""Parts of a model that config.json declares and nothing stores, names that engines do not know, integer biases."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support.exports import DATA, restore
from support.model import Model, int8_linear
from support.reported import codes, finding, load, refusal

from quarkconv import convert_checkpoint, inspect_checkpoint, verify_checkpoint

O_PROJ: Final = "model.layers.0.self_attn.o_proj"
EXPERTS: Final = tuple(f"model.layers.{layer}.mlp.experts" for layer in range(2))


def changed(change: Callable[[Model], object], **settings: Any) -> Model:
    model = Model()
    change(model)
    model.config |= settings
    return model


@pytest.mark.parametrize(
    ("model", "subject", "words"),
    [
        (changed(lambda model: model.remove("lm_head"), tie_word_embeddings=False), "config.json", "no head of"),
        (changed(lambda model: model.remove("model.embed_tokens"), vocab_size=16), "config.json", "No embeddings"),
        (changed(lambda _: None, vocab_size=100), "model.embed_tokens", "vocab_size 100, but the embeddings"),
        (
            changed(lambda model: model.set("model.embed_tokens.weight", torch.ones(16, 9).bfloat16()), hidden_size=8),
            "model.embed_tokens",
            "hidden_size 8, the embeddings are [16, 9]",
        ),
        (
            changed(
                lambda model: model.set("model.layers.1.input_layernorm.weight", torch.ones(9).bfloat16()),
                hidden_size=8,
            ),
            "model.layers.1.input_layernorm.weight",
            "hidden_size 8, which these norms do not have",
        ),
        (changed(lambda _: None, n_shared_experts=1), "model.layers.0.mlp", "2 MoE layers store none"),
        (
            changed(lambda model: model.remove("model.layers.1.self_attn")),
            "model.layers.1.mlp",
            "1 MoE layer without attention linears",
        ),
    ],
)
def test_what_is_declared_and_not_stored_is_named(model: Model, subject: str, words: str, tmp_path: Path) -> None:
    source = model.write(tmp_path)
    assert codes(source) == {"config-mismatch": "warning"}
    found = finding(source, "config-mismatch")
    assert (found.subject, words in found.message) == (subject, True)
    assert not [row for row in inspect_checkpoint(source).engines if row.verdict == "int8"]


def with_float_shared_expert(model: Model) -> None:
    for name in ("up_proj", "down_proj"):
        model.set(f"model.layers.0.mlp.shared_expert.{name}.weight", torch.ones(8, 8).bfloat16())


@pytest.mark.parametrize(
    "model",
    [
        changed(lambda model: model.remove("lm_head"), tie_word_embeddings=True),
        changed(lambda model: model.remove("lm_head")),
        changed(with_float_shared_expert),
        changed(lambda _: None, n_shared_experts=0),
    ],
)
def test_what_config_json_does_not_declare_may_be_missing(model: Model, tmp_path: Path) -> None:
    assert "config-mismatch" not in codes(model.write(tmp_path))


def test_a_latent_width_that_the_experts_do_not_have_is_named(tmp_path: Path) -> None:
    source = restore(DATA / "families" / "nemotron_h-0.13-f2f", tmp_path / "source")
    config = json.loads((source / "config.json").read_text())
    assert "config-mismatch" not in codes(source)
    (source / "config.json").write_text(json.dumps(config | {"moe_latent_size": config["hidden_size"] // 2}))
    assert "latent width of 8, but the experts have 16" in finding(source, "config-mismatch").message


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "base_model.model."])
def test_names_below_a_wrapper_are_named_and_no_engine_is_said_to_run_them(wrapper: str, tmp_path: Path) -> None:
    model = Model()
    for shard in model.shards:
        for name in list(shard):
            shard[f"{wrapper}{name}"] = shard.pop(name)
    source = model.write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert (finding(source, "wrapped-names").subject, inspection.engines) == (f"{wrapper}{EXPERTS[0]}", ())
    assert not inspection.headline.startswith("Sound")
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out")
    assert "wrapped-names" in {item.code for item in out.plan.losses}
    assert "wrapped-names" in {item.code for item in verify_checkpoint(out.output, device="cpu").findings}


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
def test_an_integer_bias_is_of_unknown_meaning(dtype: torch.dtype, tmp_path: Path) -> None:
    """It may be that of a scale that is not stored: engines would take it as it is."""
    model = Model()
    model.set(f"{O_PROJ}.bias", torch.ones(8, dtype=dtype))
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert f"{O_PROJ}.bias" in {item.subject for item in inspection.findings}
    assert "tensors of unknown meaning" in inspection.not_checked


@pytest.mark.parametrize("dtype", [torch.int32, torch.int8])
def test_integer_biases_of_experts_are_unsupported_and_not_corrupt(dtype: torch.dtype, tmp_path: Path) -> None:
    model = Model()
    for shard in model.shards:
        for name in [name for name in shard if ".experts." in name and name.endswith(".weight")]:
            shard[name.replace("weight", "bias")] = torch.ones(len(shard[name]), dtype=dtype)
    error = refusal(model.write(tmp_path), "fused-int8")
    assert (error.exit_code, "bias" in str(error)) == (4, True)


def test_experts_joined_in_linears_of_three_dimensions_are_converted_by_name_only(tmp_path: Path) -> None:
    model = Model()
    for shard, prefix in zip(model.shards, EXPERTS, strict=True):
        for end in ("weight", "weight_scale"):
            gate, up, down = (
                torch.stack([shard.pop(f"{prefix}.{number}.{leaf}_proj.{end}") for number in range(3)])
                for leaf in ("gate", "up", "down")
            )
            shard[f"{prefix}.gate_up_proj.{end}"] = torch.cat([gate, up], dim=1)
            shard[f"{prefix}.down_proj.{end}"] = down
    source = model.write(tmp_path / "source")
    assert f"{EXPERTS[0]}.gate_up_proj" in finding(source, "experts-not-understood").message
    assert refusal(source, "fused-int8").exit_code == 4
    out = convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    assert torch.equal(
        load(out)[f"{EXPERTS[0]}.gate_up_proj.weight"], load(source)[f"{EXPERTS[0]}.gate_up_proj.weight"]
    )
    assert verify_checkpoint(out, source, device="cpu").ok


@pytest.mark.parametrize("lost", ["up_proj", "down_proj"])
@pytest.mark.parametrize("mlp", ["model.layers.0.mlp.shared_expert", "model.layers.2.mlp"])
def test_an_mlp_that_lacks_a_projection_is_named(mlp: str, lost: str, tmp_path: Path) -> None:
    model = Model()
    parts = {name: int8_linear(f"{mlp}.{name}", 8, 8) for name in ("gate_proj", "up_proj", "down_proj")}
    model.config["num_hidden_layers"] = 3
    model.first |= parts["gate_proj"] | parts["up_proj"] | parts["down_proj"]
    model.first["model.layers.2.input_layernorm.weight"] = torch.ones(8).bfloat16()
    assert codes(model.write(tmp_path / "whole")) == {}
    for name in parts[lost]:
        del model.first[name]
    source = model.write(tmp_path / "part")
    assert codes(source) == {"config-mismatch": "warning"}
    assert finding(source, "config-mismatch").subject == f"{mlp}.{lost}"
    assert not any(fact.verdict == "int8" for fact in inspect_checkpoint(source).engines)


@pytest.mark.parametrize("name", ["gate.bias", "gate.scale_factor", "expert_bias"])
def test_tensors_of_the_router_that_its_family_does_not_have_are_not_sound(name: str, tmp_path: Path) -> None:
    model = Model()
    model.first[f"model.layers.0.mlp.{name}"] = torch.ones(3)
    inspection = inspect_checkpoint(model.write(tmp_path), deep=True)
    assert not inspection.headline.startswith("Sound")
    assert f"model.layers.0.mlp.{name} is among the router's tensors" in str(inspection.not_checked)


@pytest.mark.parametrize("norm", ["input_layernorm", "post_attention_layernorm"])
def test_biases_of_norms_are_named_and_no_engine_is_said_to_run_them(norm: str, tmp_path: Path) -> None:
    """As msModelSlim writes them with ``anti_method`` m4; vllm-ascend reads them, vLLM and SGLang do not."""
    model = Model()
    model.first[f"model.layers.0.{norm}.bias"] = torch.zeros(8).bfloat16()
    source = model.write(tmp_path)
    assert codes(source) == {"norm-biases": "warning"}
    inspection = inspect_checkpoint(source, deep=True)
    assert not inspection.headline.startswith("Sound")
    assert not any(fact.verdict == "int8" for fact in inspection.engines)


LINEARS: Final = {
    "self_attn.o_proj": "attention_bias", "self_attn.q_proj": "qkv_bias", "mlp.shared_expert.up_proj": "mlp_bias",
}  # fmt: skip
"""A linear -> a setting by which it has a bias."""


@pytest.mark.parametrize("linear", LINEARS)
def test_biases_of_linears_that_config_json_does_not_declare_are_named(linear: str, tmp_path: Path) -> None:
    model, module = Model(), f"model.layers.0.{linear}"
    for part in ("gate_proj", "up_proj", "down_proj") if "shared" in linear else (linear.rpartition(".")[2],):
        model.first |= int8_linear(f"{module.rpartition('.')[0]}.{part}", 8, 8)
    model.set(f"{module}.bias", torch.ones(8).bfloat16())
    source = model.write(tmp_path / "source")
    inspection = inspect_checkpoint(source, deep=True)
    assert (codes(source), finding(source, "linear-biases").subject) == ({"linear-biases": "warning"}, f"{module}.bias")
    assert not inspection.headline.startswith("Sound")
    assert not any(fact.verdict == "int8" for fact in inspection.engines)
    out = convert_checkpoint(source, "fused-int8", tmp_path / "out")
    assert [item.code for item in out.plan.losses] == ["linear-biases"]
    assert [item.code for item in verify_checkpoint(out.output, device="cpu").findings] == ["linear-biases"]
    model.config[LINEARS[linear]] = True
    assert "linear-biases" not in codes(model.write(tmp_path / "declared"))


def test_biases_that_the_model_type_has_are_no_finding(tmp_path: Path) -> None:
    model = Model()
    model.config["model_type"] = "qwen2_moe"
    model.first |= int8_linear("model.layers.0.self_attn.q_proj", 8, 8)
    model.first["model.layers.0.self_attn.q_proj.bias"] = torch.ones(8).bfloat16()
    assert "linear-biases" not in codes(model.write(tmp_path))


def test_biases_of_norms_of_an_encoder_are_its_own(tmp_path: Path) -> None:
    model = Model()
    model.first["vision_model.model.layers.0.input_layernorm.bias"] = torch.zeros(8).bfloat16()
    assert "norm-biases" not in codes(model.write(tmp_path))
