"""The table of families: which models are known, from which part of their config, and what makes one unknown."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from quarkconv.experts.families import FAMILIES
from quarkconv.experts.function import Routing, Unknown
from quarkconv.experts.knowledge import knowledge
from quarkconv.experts.known import Known
from quarkconv.experts.router_tensors import router_tensor_names

DATA = Path(__file__).parents[1] / "data" / "routing"
CASES: dict[str, dict[str, Any]] = json.loads((DATA / "goldens.json").read_text())["cases"]

# The mixtures of experts among Quark 0.13's templates, by the type of their language model, and those beside them.
TEMPLATES = {
    "mixtral", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "deepseek_v2", "deepseek_v3", "kimi_k2",
    "glm4_moe", "minimax_m2", "deepseek_v32", "glm4_moe_lite", "glm_moe_dsa", "glm5_next", "qwen3_vl_moe",
    "qwen4_exp", "deepseek", "deepseek_v4", "minimax_m3", "kimi_linear", "gemma4", "llama4", "granitemoehybrid",
    "gpt_oss", "dbrx", "grok-1",
}  # fmt: skip
OTHERS = {
    "nemotron_h", "ernie4_5_moe", "hunyuan_v1_moe", "longcat_flash", "bailing_moe", "bailing_hybrid",
    "lfm2_moe", "mimo_v2", "jamba", "olmoe", "phimoe", "aria", "granitemoe", "qwen3_omni_moe",
    "qwen3_omni_moe_talker", "step3p5", "git",
}  # fmt: skip


def test_every_family_of_quark_has_a_row() -> None:
    types = {name for family in FAMILIES for name in family.types}
    assert types >= TEMPLATES
    assert types >= OTHERS


@pytest.mark.parametrize("name", sorted({name for family in FAMILIES for name in family.types}))
def test_a_config_as_transformers_writes_it_is_known(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    mapping = transformers.CONFIG_MAPPING
    found = next((key for key in (f"{name}_text", name) if key in mapping), None)
    # Another model's type; a type of the outer config; a form of its own, where the rows read the published one.
    if found is None or name in ("git", "minimax_m3_vl", "step3p5"):
        pytest.skip(f"transformers {transformers.__version__} has no text model of this type")
    written = json.loads(mapping[found]().to_json_string(use_diff=False))
    if name == "nemotron_h":
        assert written.get("mlp_hidden_act") == "relu2"
    known = knowledge({**written, "model_type": found})
    assert isinstance(known, Known), known


@pytest.mark.parametrize("name", CASES)
def test_a_setting_of_another_family_makes_a_model_unknown(name: str) -> None:
    config = CASES[name]["config"]
    known = knowledge(config)
    assert isinstance(known, Known)
    experts = config if known.family.part is None else config[known.family.part]
    for key, value in {
        "swiglu_limit": 7.0, "swiglu_limits": [0, 7.0], "swiglu_alpha": 1.5, "activation_situ_beta": 2.0, "n_group": 4,
        "routed_scaling_factor": 2.0, "moe_latent_size": 8, "routed_expert_hidden_size": 8, "zero_expert_num": 2,
        "num_hash_layers": 1, "scoring_func": "tanh", "router_logit_softcapping": 20.0, "swiglu_new_thing": 1,
        "moe_apply_router_weight_on_input": True, "expert_act": "relu", "hidden_activation": "relu",
    }.items():  # fmt: skip
        if key in known.family.understood() and key not in known.family.fixed:
            continue
        changed = {**experts, key: value}
        found = knowledge(changed if known.family.part is None else {**config, known.family.part: changed})
        assert isinstance(found, Unknown), key
        assert found.key == key


@pytest.mark.parametrize("name", CASES)
def test_a_neutral_setting_does_not(name: str) -> None:
    for key in ("swiglu_limit", "router_logit_softcapping", "zero_expert_num", "expert_act"):
        known = knowledge(CASES[name]["config"])
        assert isinstance(known, Known)
        if key not in known.family.understood():
            assert isinstance(knowledge({**CASES[name]["config"], key: None}), Known)


def test_a_router_that_divides_is_not_one_that_does_not() -> None:
    assert isinstance(knowledge({"model_type": "mixtral", "norm_topk_prob": True}), Known)
    assert knowledge({"model_type": "mixtral", "norm_topk_prob": False}) == Unknown(
        "config.json has norm_topk_prob = False, whose effect is unknown", "norm_topk_prob"
    )
    assert isinstance(knowledge({"model_type": "jamba", "norm_topk_prob": False}), Known)
    assert isinstance(knowledge({"model_type": "jamba", "norm_topk_prob": True}), Unknown)
    assert isinstance(knowledge({"model_type": "gpt_oss", "norm_topk_prob": True}), Known)


def test_two_names_of_one_setting_have_to_agree() -> None:
    config = CASES["bailing_hybrid"]["config"]
    assert isinstance(knowledge({**config, "n_group": config["num_expert_group"]}), Known)
    found = knowledge({**config, "n_group": 2})
    assert isinstance(found, Unknown)
    assert found.reason == "config.json has num_expert_group = 4 and n_group = 2"


@pytest.mark.parametrize(
    ("config", "module", "model_type", "top_k"),
    [
        ({"model_type": "deepseek_vl_v2", "language_config": {"model_type": "deepseek_v2", "num_experts_per_tok": 6,
          "topk_method": "greedy", "routed_scaling_factor": 1.0}}, "", "deepseek_v2", 6),
        ({"model_type": "kimi_k25", "text_config": {**CASES["kimi_k2"]["config"]}}, "", "kimi_k2", 3),
        ({"model_type": "kimi_k3", "text_config": {**CASES["kimi_linear"]["config"]}}, "", "kimi_linear", 4),
        ({"model_type": "glm5_next", "text_config": CASES["glm5_next"]["config"]}, "", "glm5_next", 3),
        ({"model_type": "internvl", "llm_config": CASES["qwen3_moe"]["config"]}, "", "qwen3_moe", 3),
        ({"model_type": "wrapped", "text_config": {"num_experts_per_tok": 2}}, "", None, None),
        ({"model_type": "mixtral", "text_config": {"num_experts_per_tok": 2}}, "", "mixtral", 2),
        ({"model_type": "grok-2", "architectures": ["Grok1ForCausalLM"], "num_experts_per_tok": 2}, "", "grok-2", 2),
        ({"model_type": "git", "num_experts_per_tok": 2}, "", None, None),
    ],
)  # fmt: skip
def test_where_the_language_model_is(
    config: dict[str, Any], module: str, model_type: str | None, top_k: int | None
) -> None:
    known = knowledge(config, module)
    assert (known.model_type if isinstance(known, Known) else None) == model_type
    if isinstance(known, Known):
        routing = known.routing(16 if model_type == "kimi_linear" else 8)
        assert isinstance(routing, Routing)
        assert routing.top_k == top_k


OMNI = {
    "model_type": "qwen3_omni_moe",
    "thinker_config": {"text_config": CASES["qwen3_omni_moe"]["config"]},
    "talker_config": {"text_config": CASES["qwen3_omni_moe_talker"]["config"]},
}


@pytest.mark.parametrize(
    ("module", "top_k", "renormalize"),
    [("", 3, True), ("thinker.model.layers.0.mlp", 3, True), ("talker.model.layers.0.mlp", 2, False)],
)
def test_each_stack_of_experts_has_its_own_part(module: str, top_k: int, renormalize: bool) -> None:
    known = knowledge(OMNI, module)
    assert isinstance(known, Known)
    routing = known.routing(8)
    assert isinstance(routing, Routing)
    assert (routing.top_k, routing.renormalize) == (top_k, renormalize)


def test_the_first_layers_route_by_token_id() -> None:
    config = {key: value for key, value in CASES["deepseek_v4"]["config"].items() if key != "mlp_layer_types"}
    known = knowledge({**config, "num_hash_layers": 2})
    assert isinstance(known, Known)
    assert known.routing(8) == Unknown("the first 2 layers choose experts by token id", "num_hash_layers")
    for layer, by_token_id in enumerate((True, True, False)):
        found = known.routing(8, layer)
        assert isinstance(found, Routing)
        assert found.by_token_id is by_token_id
        assert found.has_correction_bias is not by_token_id


@pytest.mark.parametrize(("layer", "top_k"), [(0, 2), (1, 3), (2, None), (None, None)])
def test_settings_of_each_layer_are_read_from_lists(layer: int | None, top_k: int | None) -> None:
    known = knowledge({"model_type": "hunyuan_v1_moe", "num_experts": [8, 8], "moe_topk": [2, 3]})
    assert isinstance(known, Known)
    routing = known.routing(8, layer)
    assert (routing.top_k if isinstance(routing, Routing) else None) == top_k


def test_a_latent_width_is_known() -> None:
    known = knowledge(CASES["nemotron_h-latent"]["config"])
    assert isinstance(known, Known)
    assert known.hidden_size() == 8
    plain = knowledge(CASES["nemotron_h"]["config"])
    assert isinstance(plain, Known)
    assert plain.hidden_size() is None


# As published; the second column where Quark exports from memory under transformers 5.
NAMES = {
    "mixtral": ("gate.weight", None),
    "deepseek_v4": ("gate.weight", "gate.bias"),
    "minimax_m3": ("gate.weight", "e_score_correction_bias"),
    "gemma4": ("router.proj.weight", None),
    "llama4": ("router.weight", None),
    "granitemoehybrid": ("router.layer.weight", None),
    "gpt_oss": ("router.weight", None),
    "dbrx": ("router.layer.weight", None),
    "nemotron_h": ("gate.weight", "gate.e_score_correction_bias"),
    "ernie4_5_moe": ("gate.weight", "moe_statics.e_score_correction_bias"),
    "hunyuan_v1_moe": ("gate.wg.weight", None),
    "longcat_flash": ("router.classifier.weight", "router.e_score_correction_bias"),
    "bailing_moe_v2": ("gate.weight", "gate.expert_bias"),
    "lfm2_moe": ("gate.weight", "expert_bias"),
    "jamba": ("router.weight", None),
    "phimoe": ("gate.weight", None),
    "aria": ("router.weight", None),
}


@pytest.mark.parametrize("name", NAMES)
def test_names_of_router_tensors(name: str) -> None:
    known = knowledge(CASES[name]["config"])
    assert isinstance(known, Known)
    routing = known.routing(CASES[name]["experts"], 1)
    assert isinstance(routing, Routing)
    names = router_tensor_names(routing, "layers.1.moe")
    assert names[:2] == tuple(part and f"layers.1.moe.{part}" for part in NAMES[name])


def test_the_name_that_is_stored_counts() -> None:
    known = knowledge(CASES["minimax_m3"]["config"])
    assert isinstance(known, Known)
    routing = known.routing(8)
    assert isinstance(routing, Routing)
    names = router_tensor_names(routing, "mlp", {"mlp.gate.e_score_correction_bias"}.__contains__)
    assert names.bias == "mlp.gate.e_score_correction_bias"
    gpt_oss = knowledge(CASES["gpt_oss"]["config"])
    assert isinstance(gpt_oss, Known)
    routing = gpt_oss.routing(8)
    assert isinstance(routing, Routing)
    assert router_tensor_names(routing, "mlp").logit_bias == "mlp.router.bias"


@pytest.mark.parametrize(
    "config", [None, [], "", {}, {"model_type": 7}, {"model_type": "dbrx"}, {"model_type": "dbrx", "ffn_config": 3}]
)
def test_nonsense_is_unknown(config: object) -> None:
    assert isinstance(knowledge(config), Unknown)
