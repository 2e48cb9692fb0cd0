"""Model types that users reported: two stacks of experts, and types without a tested engine."""

from __future__ import annotations

from pathlib import Path
from typing import Final

import pytest
import torch
from support.exports import DATA, restore
from support.model import Model, int8_linear
from support.reported import codes, finding, two_stacks

from quarkconv import inspect_checkpoint

# Two stacks of experts (vllm-omni 5573)


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


# Model types that no engine was run with


@pytest.mark.parametrize("model_type", ["dbrx", "kimi_k3", "a_type_of_tomorrow", None])
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


def test_engines_are_checked_with_encoders_in_float_only(tmp_path: Path) -> None:
    """SGLang 0.5.23 gives the encoder of qwen3_vl_moe no quantization, and so takes its codes for weights."""
    model = Model()
    for shard in model.shards:
        for name in [name for name in shard if name.startswith("model.")]:
            shard[name.replace("model.", "model.language_model.", 1)] = shard.pop(name)
    text = {**model.config, "model_type": "qwen3_vl_moe_text"}
    quantization = {**text.pop("quantization_config"), "exclude": ["lm_head", "re:.*mlp.gate$"]}
    model.config = {"model_type": "qwen3_vl_moe", "text_config": text, "vision_config": {}}
    model.config["quantization_config"] = quantization
    engines = inspect_checkpoint(model.write(tmp_path / "float")).engines
    runs = {fact.engine for fact in engines if fact.verdict == "int8"}
    assert runs == {"vllm", "sglang"}
    model.first |= int8_linear("model.visual.blocks.0.attn.qkv", 24, 8)
    engines = inspect_checkpoint(model.write(tmp_path / "int8")).engines
    assert "int8" not in {fact.verdict for fact in engines}
    assert any(fact.note.endswith("with encoders in float") for fact in engines)


def renamed(*changes: tuple[str, str]) -> Model:
    """A model with other names of tensors."""
    model = Model()
    for shard in model.shards:
        for name in list(shard):
            other = name
            for old, new in changes:
                other = other.replace(old, new)
            shard[other] = shard.pop(name)
    model.quantization["exclude"] = ["lm_head", "re:.*[.]gate$"]
    return model


def joined() -> Model:
    """A model whose experts have gate and up in one projection."""
    model = Model()
    for shard in model.shards:
        for gate in [name for name in shard if ".gate_proj." in name]:
            rows = [shard.pop(gate), shard.pop(gate.replace("gate_proj", "up_proj"))]
            shard[gate.replace("gate_proj", "gate_up_proj")] = torch.cat(rows)
    return model


@pytest.mark.parametrize(
    "model",
    [
        renamed((".mlp.", ".moe.")),
        renamed(("experts.0.gate_proj", "experts.0.w1"), ("experts.1.gate_proj", "experts.1.w1"),
                ("experts.2.gate_proj", "experts.2.w1"), (".up_proj", ".w3"), (".down_proj", ".w2")),
        joined(),
    ],
    ids=["another module", "other projections", "gate and up as one"],
)  # fmt: skip
def test_engines_are_checked_with_the_published_names_of_experts_only(model: Model, tmp_path: Path) -> None:
    assert any(fact.verdict == "int8" for fact in inspect_checkpoint(Model().write(tmp_path / "usual")).engines)
    inspection = inspect_checkpoint(model.write(tmp_path / "renamed"))
    assert inspection.ok
    assert not any(fact.verdict in ("int8", "w8a16") for fact in inspection.engines)
    assert any(fact.note.endswith("with the published names of experts") for fact in inspection.engines)


NAMED_AS_IN_TRANSFORMERS: Final = {"deepseek_v4", "kimi_linear", "lfm2_moe", "minimax_m3_vl", "phimoe"}
"""Families whose classes in transformers 5 name experts otherwise than published checkpoints, which engines read."""


@pytest.mark.parametrize("kept", sorted((DATA / "families").glob("*-0.13-*")), ids=lambda path: path.name)
def test_exports_have_the_published_names_where_quark_keeps_them(kept: Path, tmp_path: Path) -> None:
    """File to file it keeps them; from memory it writes those of the classes of transformers."""
    family, _, flow = kept.name.rpartition("-0.13-")
    inspection = inspect_checkpoint(restore(kept, tmp_path / "export"))
    renamed = any(fact.note.endswith("with the published names of experts") for fact in inspection.engines)
    assert renamed == (flow == "eager" and family in NAMED_AS_IN_TRANSFORMERS)


@pytest.mark.parametrize(
    ("architecture", "is_checked"),
    [
        ("Qwen3MoeForCausalLM", True),
        ("Qwen3MoeForSequenceClassification", False),
        ("Qwen3MoeForTokenClassification", False),
        ("Qwen3MoeModel", False),
    ],
)
def test_engines_are_checked_with_heads_of_language_models_only(
    architecture: str, is_checked: bool, tmp_path: Path
) -> None:
    model = Model()
    model.config["architectures"] = [architecture]
    engines = inspect_checkpoint(model.write(tmp_path)).engines
    assert any(fact.verdict == "int8" for fact in engines) == is_checked
