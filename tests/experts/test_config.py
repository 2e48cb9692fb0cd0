"""What config.json says of the model, wherever it says it."""

from __future__ import annotations

import copy
from typing import Any

import pytest

from quarkconv.experts.config import model_config

QUANTIZATION = {"quant_method": "quark"}
FIELDS = ("model_type", "experts", "top_k", "hidden_layers", "mtp_layers", "activation")


def fields(config: dict[str, Any]) -> dict[str, Any]:
    """The fields that are not None."""
    found = model_config(config)
    return {name: value for name in FIELDS if (value := getattr(found, name)) is not None}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"model_type": "qwen3_moe", "num_experts": 8, "num_experts_per_tok": 2, "hidden_act": "silu"},
            {"model_type": "qwen3_moe", "experts": 8, "top_k": 2, "activation": "silu"},
        ),
        ({"n_routed_experts": 256, "num_hidden_layers": 61}, {"experts": 256, "hidden_layers": 61}),
        ({"num_local_experts": 8}, {"experts": 8}),
        ({"moe_num_experts": 288, "moe_top_k": 8}, {"experts": 288, "top_k": 8}),
        (
            {"model_type": "qwen3_5_moe", "text_config": {"model_type": "qwen3_5_moe_text", "num_experts": 4}},
            {"model_type": "qwen3_5_moe_text", "experts": 4},
        ),
        ({"model_type": "vlm", "text_config": {"num_experts": 4}}, {"model_type": "vlm", "experts": 4}),
        (
            {
                "model_type": 1,
                "num_experts": "8",
                "num_experts_per_tok": True,
                "num_hidden_layers": -1,
                "hidden_act": [],
            },
            {},
        ),
        ({"num_experts": 0, "num_local_experts": 8.0, "text_config": []}, {}),
        ({}, {}),
        (
            {
                "model_type": "dbrx",
                "n_layers": 2,
                "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_act_fn": {"name": "silu"}},
            },
            {"model_type": "dbrx", "experts": 16, "top_k": 4, "hidden_layers": 2, "activation": "silu"},
        ),
        ({"num_layers": 2, "num_experts": 16, "moe_topk": [8, 8]}, {"experts": 16, "top_k": 8, "hidden_layers": 2}),
        ({"num_hidden_layers": 2, "moe_topk": [8, 1], "num_experts": [64, 64, 64]}, {"hidden_layers": 2}),
        ({"num_hidden_layers": 2, "num_nextn_predict_layers": 1}, {"hidden_layers": 2, "mtp_layers": 1}),
        ({"text_config": {"mtp_num_hidden_layers": 1}}, {"mtp_layers": 1}),
    ],
)  # fmt: skip
def test_the_claims_of_a_config_are_read(config: dict[str, Any], expected: dict[str, Any]) -> None:
    assert fields(config) == expected


@pytest.mark.parametrize("part", ["text_config", "llm_config", "language_config"])
def test_the_language_model_of_a_multimodal_model_is_read_under_each_name(part: str) -> None:
    nested = {"model_type": "inner", "num_experts": 4, "quantization_config": QUANTIZATION}
    config = model_config({"model_type": "outer", part: nested})
    assert (config.path, config.text) == ((part,), nested)
    assert (config.model_type, config.experts) == ("inner", 4)
    assert config.quantization == QUANTIZATION


def test_a_part_that_is_not_an_object_is_not_the_language_model() -> None:
    assert model_config({"text_config": None, "llm_config": {"a": 1}}).text == {"a": 1}
    assert model_config({"a": 1}).text == {"a": 1}


def test_the_stack_of_a_module_has_its_own_part() -> None:
    thinker, talker = {"num_experts": 128}, {"num_experts": 64}
    raw = {"thinker_config": {"text_config": thinker}, "talker_config": {"text_config": talker}}
    config = model_config(raw)
    assert (config.path, config.experts) == (("thinker_config", "text_config"), 128)
    assert config.part_of("talker.model.layers.0.mlp") is talker
    assert config.part_of("thinker.model.layers.0.mlp") is thinker
    assert config.part_of("model.layers.0.mlp") is thinker
    assert model_config({"num_experts": 2}).part_of("talker.model") == {"num_experts": 2}


def test_a_quantization_config_at_the_top_comes_first() -> None:
    raw = {"quantization_config": {"a": 1}, "text_config": {"quantization_config": {"b": 1}}}
    assert model_config(raw).quantization == {"a": 1}
    assert model_config({"quantization_config": None}).quantization is None
    assert model_config({"text_config": {}}).quantization is None


@pytest.mark.parametrize(
    "raw",
    [
        {"a": 1, "quantization_config": {"b": 1}},
        {"text_config": {"quantization_config": {"b": 1}, "c": 2}},
        {"llm_config": {"quantization_config": {"b": 1}}, "language_config": {"quantization_config": {"d": 1}}},
        {"thinker_config": {"text_config": {"quantization_config": {"b": 1}, "e": 1}, "f": 1}, "g": 1},
    ],
)
def test_another_quantization_config_replaces_every_one(raw: dict[str, Any]) -> None:
    before = copy.deepcopy(raw)
    config = model_config(raw)
    replaced = config.with_quantization({"new": 1})
    assert model_config(replaced).quantization == {"new": 1}
    assert "'b'" not in str(replaced)
    assert "'d'" not in str(replaced)
    none = config.with_quantization(None)
    assert model_config(none).quantization is None
    assert {key for key in none if key != "quantization_config"} == raw.keys() - {"quantization_config"}
    assert raw == before


@pytest.mark.parametrize("layers", [[8], [1], [], [2, 2], "2", None, 2.5])
def test_a_number_of_layers_of_the_wrong_type_is_absent(layers: Any) -> None:
    assert fields({"num_hidden_layers": layers, "num_experts": [8, 8]}) == {}


def test_each_stack_has_a_number_of_experts_of_its_own() -> None:
    config = model_config(
        {
            "thinker_config": {"text_config": {"num_experts": 6}},
            "talker_config": {"text_config": {"num_local_experts": 4}},
        }
    )
    assert config.local_experts_of("thinker.model.layers.0.mlp.experts") == 6
    assert config.local_experts_of("talker.model.layers.0.mlp.experts") == 4
    assert model_config({"ffn_config": {"moe_num_experts": 3}}).local_experts_of("model.layers.0") == 3
    assert model_config({}).local_experts_of("model.layers.0") is None
