"""Routing from configs: of every family, of exports; unknown where a config is incomplete or inconsistent."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
from support.routing import CASES, EXPORTED, golden_routing, routing_from_config

VALID = {name: (CASES[name]["config"], CASES[name]["experts"]) for name in CASES}
"""A config of each family, of which one key at a time is changed below."""

DESCRIPTIONS = {
    "mixtral": "softmax, top 2 of 8, renormalised",
    "qwen2_moe": "softmax, top 4 of 8, not renormalised",
    "qwen3_moe": "softmax, top 3 of 8, renormalised",
    "qwen3_moe-not_renormalised": "softmax, top 3 of 8, not renormalised",
    "qwen3_next": "softmax, top 5 of 16, renormalised",
    "qwen3_5_moe": "softmax, top 4 of 16, renormalised",
    "deepseek_v2-greedy": "softmax, top 3 of 8, not renormalised",
    "deepseek_v2-groups": "softmax, top 3 of 12 in 2 of 4 groups, not renormalised, x16",
    "deepseek_v3": "sigmoid + correction bias, top 4 of 16 in 2 of 4 groups, renormalised, x2.5",
    "deepseek_v3-not_renormalised": "sigmoid + correction bias, top 2 of 9 in 1 of 3 groups, not renormalised, x1.5",
    "kimi_k2": "sigmoid + correction bias, top 3 of 8, renormalised, x2.827",
    "glm4_moe": "sigmoid + correction bias, top 3 of 8 in 1 of 2 groups, renormalised, x1.5",
    "minimax_m2": "sigmoid + correction bias, top 3 of 8, renormalised",
    "step3p5": "sigmoid + correction bias, top 3 of 8, renormalised, x3",
    "deepseek_v32": "sigmoid + correction bias, top 4 of 16 in 2 of 4 groups, renormalised, x2.5",
    "glm4_moe_lite": "sigmoid + correction bias, top 3 of 8 in 2 of 4 groups, renormalised, x2.5",
    "glm_moe_dsa": "sigmoid + correction bias, top 2 of 8, renormalised, x2.5",
    "glm5_next": "sigmoid + correction bias, top 3 of 8 in 1 of 2 groups, renormalised, x2.5",
    "mimo_v2": "sigmoid + correction bias, top 3 of 8 in 1 of 2 groups, renormalised",
    "nemotron_h": "sigmoid + correction bias, top 3 of 8 in 2 of 4 groups, renormalised, x2.5",
    "nemotron_h-latent": "sigmoid + correction bias, top 2 of 8, renormalised",
    "bailing_hybrid": "sigmoid + correction bias, top 4 of 16 in 2 of 4 groups, renormalised, x2.5",
    "kimi_linear": "sigmoid + correction bias, top 4 of 16 in 2 of 4 groups, renormalised, x2.446",
    "minimax_m3": "sigmoid + correction bias, top 3 of 8, renormalised, x2",
    "deepseek_v4": "sqrtsoftplus + correction bias, top 3 of 8, renormalised, x1.5",
    "lfm2_moe": "sigmoid + correction bias, top 3 of 8, renormalised, x1.5",
    "llama4": "sigmoid of the chosen, top 2 of 8, not renormalised, weights on the input",
    "qwen4_exp": "softmax, top 3 of 8, renormalised",
    "qwen3_vl_moe": "softmax, top 3 of 8, renormalised",
    "qwen3_omni_moe": "softmax, top 3 of 8, renormalised",
    "qwen3_omni_moe_talker": "softmax, top 2 of 8, not renormalised",
    "olmoe": "softmax, top 3 of 8, not renormalised",
    "jamba": "softmax, top 2 of 8, not renormalised",
    "granitemoehybrid": "softmax of the chosen, top 3 of 8",
    "aria": "softmax of the chosen, top 3 of 8",
    "gpt_oss": "softmax of the chosen, top 3 of 8",
    "phimoe": "sparsemixer, top 2 of 8, not renormalised",
    "dbrx": "softmax, top 3 of 8, renormalised",
    "dbrx-2_norm": "softmax, top 3 of 8, renormalised by the 2-norm",
    "gemma4": "softmax, top 3 of 8, renormalised, scaled per expert",
    "ernie4_5_moe": "softmax + correction bias, top 3 of 8, renormalised",
    "hunyuan_v1_moe": "softmax, top 3 of 8, renormalised",
    "longcat_flash": "softmax + correction bias, top 3 of 8 and 4 without weights, not renormalised, x6",
    "deepseek": "softmax, top 3 of 8, not renormalised",
    "deepseek_v2-noaux_tc": "sigmoid + correction bias, top 3 of 8 in 1 of 2 groups, renormalised, x2",
    "bailing_moe": "softmax, top 3 of 8, renormalised",
    "bailing_moe_v3": "sigmoid + correction bias, top 4 of 16 in 2 of 4 groups, renormalised, x2.5",
    "kimi_k3": "sigmoid + correction bias, top 4 of 16 in 1 of 2 groups, renormalised, x2.5",
    "bailing_moe_v2": "sigmoid + correction bias, top 4 of 16 in 2 of 4 groups, renormalised, x2.5",
    "grok-2": "softmax, top 2 of 8, not renormalised, logits capped at 30",
}


def test_every_routing_describes_itself() -> None:
    assert {name: golden_routing(name).describe() for name in CASES} == DESCRIPTIONS


@pytest.mark.parametrize(
    ("name", "experts", "description"),
    [
        ("deepseek_v3-quark0.13-f2f", 8, "sigmoid + correction bias, top 4 of 8 in 2 of 4 groups, renormalised, x2.5"),
        ("minimax_m2-quark0.13-f2f", 8, "sigmoid + correction bias, top 4 of 8, renormalised"),
        ("mixtral-quark0.11-eager", 6, "softmax, top 2 of 6, renormalised"),
        ("mixtral-quark0.13-eager-experts_left_bf16", 6, "softmax, top 2 of 6, renormalised"),
        ("qwen3_moe-bf16", 8, "softmax, top 3 of 8, renormalised"),
        ("qwen3_moe-quark0.11-eager-int8_static", 8, "softmax, top 3 of 8, renormalised"),
        ("qwen3_moe-quark0.13-f2f", 8, "softmax, top 3 of 8, renormalised"),
        ("qwen3_moe-quark0.13-f2f-per_tensor_weight", 8, "softmax, top 3 of 8, renormalised"),
        ("step3p5-like-3key_fused", 6, "sigmoid + correction bias, top 2 of 6, renormalised, x3"),
    ],
)
def test_exported_configs_are_recognised(name: str, experts: int, description: str) -> None:
    routing = routing_from_config(EXPORTED[name], experts)
    assert routing is not None
    assert routing.describe() == description


def test_every_exported_config_is_tested() -> None:
    assert len(EXPORTED) == 9


def test_a_nested_text_config_is_read() -> None:
    text = CASES["qwen3_5_moe"]["config"]
    direct = golden_routing("qwen3_5_moe")
    assert text["model_type"] == "qwen3_5_moe_text"
    assert direct.model_type == "qwen3_5_moe"
    assert routing_from_config({"model_type": "qwen3_5_moe", "text_config": text}, 16) == direct
    untyped = {key: value for key, value in text.items() if key != "model_type"}
    assert routing_from_config({"model_type": "qwen3_5_moe", "text_config": untyped}, 16) == direct
    # The outer type is the wrapper's; what is inside decides.
    kimi = {"model_type": "kimi_k25", "text_config": CASES["kimi_k2"]["config"]}
    assert routing_from_config(kimi, 8) == golden_routing("kimi_k2")
    assert routing_from_config({**text, "text_config": {"model_type": "unheard_of"}}, 16) is None


HOSTILE = [None, True, False, 0, -1, 1.5, math.nan, math.inf, 10**400, "", "8", "true", [], [8], {}, {"a": 1}, b"8"]


@pytest.mark.parametrize("name", CASES)
def test_hostile_values_never_raise(name: str) -> None:
    config, experts = VALID[name]
    for key in [*config, "text_config"]:
        for value in HOSTILE:
            routing_from_config({**copy.deepcopy(config), key: value}, experts)
    for value in HOSTILE:
        assert routing_from_config(config, value) is None  # type: ignore[arg-type]
        assert routing_from_config(value, experts) is None
        assert routing_from_config({**config, "model_type": value}, experts) is None


NEEDED = {
    "mixtral": ["num_experts_per_tok"],
    "qwen2_moe": ["num_experts_per_tok", "norm_topk_prob"],
    "qwen3_moe": ["num_experts_per_tok", "norm_topk_prob"],
    "qwen3_next": ["num_experts_per_tok", "norm_topk_prob"],
    "qwen3_5_moe": ["num_experts_per_tok"],
    "deepseek_v2-greedy": ["num_experts_per_tok", "routed_scaling_factor", "topk_method"],
    "deepseek_v2-groups": ["num_experts_per_tok", "routed_scaling_factor", "topk_method", "n_group", "topk_group"],
    "deepseek_v3": ["num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group"],
    "kimi_k2": ["num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group"],
    "glm4_moe": ["num_experts_per_tok", "routed_scaling_factor", "norm_topk_prob", "n_group", "topk_group"],
    "minimax_m2": ["num_experts_per_tok"],
    "step3p5": [
        "moe_top_k",
        "moe_router_scaling_factor",
        "norm_expert_weight",
        "moe_router_activation",
        "use_moe_router_bias",
    ],
}


# Hostile values that these keys may well hold: a switch either bool, a factor any positive number.
GOOD_IN_SOME_PLACES: dict[str, list[object]] = {
    "norm_topk_prob": [True, False],
    "norm_expert_weight": [True, False],
    "use_moe_router_bias": [True],
    "routed_scaling_factor": [1.5],
    "moe_router_scaling_factor": [1.5],
}


@pytest.mark.parametrize(("name", "key"), [(name, key) for name, keys in NEEDED.items() for key in keys])
def test_needed_keys_missing_or_malformed_are_unknown(name: str, key: str) -> None:
    config, experts = VALID[name]
    assert routing_from_config({k: v for k, v in config.items() if k != key}, experts) is None
    accepted = [value for value in HOSTILE if routing_from_config({**config, key: value}, experts) is not None]
    # repr, since True == 1 and the types are the point.
    assert repr(accepted) == repr(GOOD_IN_SOME_PLACES.get(key, []))


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mixtral", {"num_experts_per_tok": 9}),
        ("mixtral", {"num_local_experts": 16}),
        ("qwen3_moe", {"n_routed_experts": True}),
        ("qwen3_5_moe", {"norm_topk_prob": False}),
        ("deepseek_v2-greedy", {"norm_topk_prob": True}),
        ("deepseek_v2-greedy", {"norm_topk_prob": 0}),
        ("deepseek_v2-greedy", {"topk_method": "noaux_tc"}),
        ("deepseek_v2-greedy", {"scoring_func": "sigmoid"}),
        ("deepseek_v3", {"scoring_func": "softmax"}),
        ("deepseek_v3", {"topk_method": "greedy"}),
        ("deepseek_v3", {"n_group": 3}),
        ("deepseek_v3", {"topk_group": 5}),
        ("deepseek_v3", {"n_group": 16}),
        ("deepseek_v3", {"topk_group": 1, "num_experts_per_tok": 5}),
        ("minimax_m2", {"use_routing_bias": False}),
        ("minimax_m2", {"scoring_func": "softmax"}),
        ("step3p5", {"use_moe_router_bias": 1}),
        ("step3p5", {"moe_router_activation": "softmax"}),
    ],
)
def test_inconsistent_or_ambiguous_settings_are_unknown(name: str, change: dict[str, Any]) -> None:
    config, experts = VALID[name]
    assert routing_from_config({**config, **change}, experts) is None


def test_an_unknown_model_type_has_no_routing() -> None:
    config, experts = VALID["mixtral"]
    assert routing_from_config({**config, "model_type": "mixtral_vision"}, experts) is None
    assert routing_from_config({}, experts) is None
