"""Model types that users reported: two stacks of experts, and types without a tested engine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import pytest
import torch
from support.checkpoints import with_class
from support.exports import DATA, restore
from support.model import Model, edited, experts, int8_linear
from support.reported import codes, finding, two_stacks

from quarkconv import convert_checkpoint, inspect_checkpoint, verify_checkpoint
from quarkconv.headers.checkpoint import open_checkpoint
from quarkconv.plan.shares import Share
from quarkconv.verify.merged import merged, verification_from_json

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
    assert all("not checked" in item.text or " fails " in item.text for item in inspection.advice)


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


NAMED_AS_IN_TRANSFORMERS: Final = {"deepseek_v4", "kimi_linear", "lfm2_moe", "minimax_m3_vl", "nemotron_h", "phimoe"}
"""Families whose classes in transformers 5 name experts otherwise than published checkpoints, which engines read."""


@pytest.mark.parametrize("kept", sorted((DATA / "families").glob("*-0.13-*")), ids=lambda path: path.name)
def test_exports_have_the_published_names_where_quark_keeps_them(kept: Path, tmp_path: Path) -> None:
    """File to file it keeps them; from memory it writes those of the classes of transformers."""
    family, _, flow = kept.name.rpartition("-0.13-")
    export = restore(kept, tmp_path / "export")
    config = json.loads((export / "config.json").read_text())
    del config["architectures"]  # by some of which no engine has a class
    (export / "config.json").write_text(json.dumps(with_class(config)))
    renamed = any(
        row.note.endswith("with the published names of experts") for row in inspect_checkpoint(export).engines
    )
    as_transformers = {("deepseek_v4", "f2f"), *((name, "eager") for name in NAMED_AS_IN_TRANSFORMERS)}
    assert renamed == ((family, flow) in as_transformers)


@pytest.mark.parametrize(
    ("architecture", "is_checked", "is_known"),
    [
        ("Qwen3MoeForCausalLM", True, True),
        ("Qwen3MoeForSequenceClassification", False, True),
        ("Qwen3MoeForTokenClassification", False, True),
        ("Qwen3MoeModel", False, True),
        ("MyForkForCausalLM", False, False),
        ("Qwen2MoeForCausalLM", False, False),
        ("Qwen3VLMoeForConditionalGeneration", False, False),
    ],
)
def test_engines_are_checked_with_the_classes_that_they_were_run_with(
    architecture: str, is_checked: bool, is_known: bool, tmp_path: Path
) -> None:
    model = Model()
    model.config["architectures"] = [architecture]
    inspection = inspect_checkpoint(model.write(tmp_path))
    assert any(fact.verdict == "int8" for fact in inspection.engines) == is_checked
    assert any("architectures" in text or "names the class" in text for text in inspection.not_checked) != is_known
    if not is_checked:
        assert {item.text for item in inspection.advice} >= {"vLLM was not checked with this model class"}


@pytest.mark.parametrize("named", [None, []])
def test_a_config_that_names_no_class_has_no_verdict(named: list[str] | None, tmp_path: Path) -> None:
    """vLLM 0.33 takes the base class of the model type (transformers_utils/config.py, get_config)."""
    model = Model()
    assert "int8" in {fact.verdict for fact in inspect_checkpoint(model.write(tmp_path / "named")).engines}
    model.config["architectures"] = named
    inspection = inspect_checkpoint(model.write(tmp_path / "unnamed"))
    assert not {fact.verdict for fact in inspection.engines} & {"int8", "w8a16"}
    assert "vLLM was not checked with a config.json without architectures" in {item.text for item in inspection.advice}


@pytest.mark.parametrize(
    ("architecture", "is_found"),
    [
        ("MixtralForCausalLM", True),
        ("DeepseekV3ForCausalLM", True),
        ("MyForkForCausalLM", False),
        ("Qwen3MoeForSequenceClassification", False),
    ],
)
def test_a_class_of_another_model_type_is_a_finding_and_passed_on(
    architecture: str, is_found: bool, tmp_path: Path
) -> None:
    model = Model()
    model.config["architectures"] = [architecture]
    source = model.write(tmp_path / "source")
    result = convert_checkpoint(source, "compressed-tensors", tmp_path / "out")
    reported = [
        {item.code for item in inspect_checkpoint(source).findings},
        {item["code"] for item in result.to_json()["findings"]},
        {item.code for item in verify_checkpoint(result.output, device="cpu", tokens=2).findings},
    ]
    assert [("class-mismatch" in found) for found in reported] == [is_found] * 3


def test_verify_does_not_prove_what_a_class_of_a_fork_computes(tmp_path: Path) -> None:
    model = Model()
    model.config["architectures"] = ["MyForkForCausalLM"]
    verification = verify_checkpoint(model.write(tmp_path), device="cpu", tokens=4)
    assert verification.numbers.layers == ()
    assert "config.json names the class 'MyForkForCausalLM'" in str(verification.numbers.skipped)


CLASSES: Final = [
    ("qwen3_vl_moe", "Qwen3VLMoeForConditionalGeneration", "model.language_model.layers.", True),
    ("qwen3_vl_moe_text", "Qwen3VLMoeTextModel", "model.layers.", False),
    ("qwen3_vl_moe_text", "Qwen3VLMoeForConditionalGeneration", "model.language_model.layers.", False),
    ("qwen3_vl_moe_text", None, "model.layers.", False),
    ("qwen3_5_moe_text", "Qwen3_5MoeForCausalLM", "model.layers.", True),
    ("glm4v_moe_text", "Glm4vMoeTextModel", "model.layers.", False),
]


@pytest.mark.parametrize(("model_type", "architecture", "stack", "is_checked"), CLASSES)
def test_the_text_model_of_a_wrapper_is_another_model_type(
    model_type: str, architecture: str | None, stack: str, is_checked: bool, tmp_path: Path
) -> None:
    model = edited(lambda name, tensor: {name.replace("model.layers.", stack): tensor})
    model.config |= {"model_type": model_type} | ({"architectures": [architecture]} if architecture else {})
    verdicts = {fact.verdict for fact in inspect_checkpoint(model.write(tmp_path)).engines}
    assert ("int8" in verdicts) == is_checked


# Stacks of layers that config.json does not describe


@pytest.mark.parametrize("stack", ["draft_model.layers.0", "eagle.layers.0", "model.speculator.layers.0"])
def test_experts_of_a_model_that_config_json_does_not_describe_have_no_verdict(stack: str, tmp_path: Path) -> None:
    model = Model()
    model.first |= experts(f"{stack}.mlp.experts", range(3))
    inspection = inspect_checkpoint(model.write(tmp_path))
    assert not {fact.verdict for fact in inspection.engines} & {"int8", "w8a16"}
    assert any(stack.split(".layers")[0].split(".")[-1] in text for text in inspection.not_checked)
    assert inspection.to_json()["moe"]["layers"][:2] == [f"model.layers.{n}.mlp.experts" for n in (0, 1)]
    assert "vLLM was not checked with these names of experts" in {item.text for item in inspection.advice}


def test_linears_of_a_draft_model_have_no_verdict_either(tmp_path: Path) -> None:
    model = Model()
    model.first["draft_model.layers.0.self_attn.o_proj.weight"] = torch.zeros(8, 8, dtype=torch.bfloat16)
    inspection = inspect_checkpoint(model.write(tmp_path))
    assert not {fact.verdict for fact in inspection.engines} & {"int8", "w8a16"}
    assert "vLLM was not checked with layers that config.json does not describe" in {
        item.text for item in inspection.advice
    }


@pytest.mark.parametrize("stack", ["model.model.layers.", "decoder.layers.", "model.layers.0.inner.layers."])
def test_experts_in_other_modules_than_published_ones_have_no_verdict(stack: str, tmp_path: Path) -> None:
    model = edited(lambda name, tensor: {name.replace("model.layers.", stack): tensor})
    assert not {fact.verdict for fact in inspect_checkpoint(model.write(tmp_path)).engines} & {"int8", "w8a16"}


def test_verify_checks_the_numbers_of_the_layers_that_config_json_describes(tmp_path: Path) -> None:
    model = Model()
    draft = "draft_model.layers.0.mlp.experts"
    model.first |= experts(draft, range(3))
    source = model.write(tmp_path / "source")
    out = convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    verification = verify_checkpoint(out, device="cpu", tokens=2)
    numbers = verification.numbers
    assert verification.ok
    assert {layer.module for layer in numbers.layers} == {f"model.layers.{n}.mlp.experts" for n in (0, 1)}
    assert [(layer.module, "does not describe" in layer.reason) for layer in numbers.not_checked] == [(draft, True)]
    assert verification.verdict() == "Verified: structure and bytes and numbers; not checked: numbers of 1 layer"
    alone = verify_checkpoint(out, device="cpu", tokens=2, layers=[draft])
    assert (alone.numbers.layers, alone.numbers.not_checked) == ((), ())
    assert "does not describe" in str(alone.numbers.skipped)
    parts = {str(n): verify_checkpoint(out, device="cpu", tokens=2, share=Share(n, 2)).to_json() for n in (1, 2)}
    whole = verification_from_json(merged(parts))
    assert whole.ok
    assert (len(whole.numbers.layers), whole.numbers.not_checked) == (2, numbers.not_checked)
    assert whole.bytes.nbytes == verification.bytes.nbytes


def test_a_wrong_byte_of_a_layer_whose_numbers_are_not_checked_is_found(tmp_path: Path) -> None:
    model = Model()
    model.first |= experts("draft_model.layers.0.mlp.experts", range(3))
    out = convert_checkpoint(model.write(tmp_path / "source"), "compressed-tensors", tmp_path / "out").output
    refs = open_checkpoint(out).refs()
    place = refs["draft_model.layers.0.mlp.experts.1.up_proj.weight"]
    with (out / place.file).open("r+b") as file:
        file.seek(place.start)
        first = file.read(1)[0]
        file.seek(place.start)
        file.write(bytes([first ^ 1]))
    problems = verify_checkpoint(out, device="cpu", tokens=2).problems
    assert [(problem.stage, problem.tensor) for problem in problems] == [
        ("bytes", "draft_model.layers.0.mlp.experts.1.up_proj.weight")
    ]
