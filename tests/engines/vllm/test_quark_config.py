"""What vLLM's QuarkConfig decides for each module, beside what is declared as we read it.

Both read the same ``quantization_config``; ours follows Quark, vLLM has rules of its own. :data:`DIFFERENCES` names
every rule in which they differ, and which modules of which configs it concerns. Elsewhere they agree.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import cache
from random import Random
from typing import Any, NamedTuple

import engines.vllm.loading  # noqa: F401  prepares vLLM for a machine without GPU
import pytest
from support.exports import EXPORTS, FIXTURES, Checkpoints
from support.quark_config import INPUT, STATIC_INPUT, TENSOR_WEIGHT, WEIGHT, layer_config, quark_config
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.quantization.quark.quark import QuarkConfig, QuarkLinearMethod
from vllm.model_executor.layers.quantization.quark.quark_moe import QuarkW8A8Int8MoEMethod
from vllm.model_executor.layers.quantization.quark.schemes import QuarkW8A8Int8
from vllm.model_executor.layers.quantization.utils import quant_utils

from quarkconv.description.description import describe
from quarkconv.scheme.formats.readers import declared_scheme
from quarkconv.scheme.spec import SCHEME_NAMES

FLOAT, OTHER = "float", "other than W8A8 int8"
CONFIGS = 600
EXPERT = re.compile(r"(?P<experts>.+\.experts)\.\d+\.\w+")

KEYS = {
    (quant_utils.kInt8StaticChannelSym, quant_utils.kInt8DynamicTokenSym): "ptpc_int8",
    (quant_utils.kInt8StaticTensorSym, quant_utils.kInt8DynamicTensorSym): "int8_per_tensor_weight",
    (quant_utils.kInt8StaticTensorSym, quant_utils.kInt8StaticTensorSym): "int8_static",
    (quant_utils.kInt8StaticChannelSym, quant_utils.kInt8StaticTensorSym): "no name",
}
"""vLLM's keys of weight and activation -> our name. Where a weight has one scale, vLLM gives the activations of all
tokens one, too, though the config says one for each token."""

LINEARS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate",
           "mlp.shared_expert.gate_proj", "mlp.shared_expert.down_proj")  # fmt: skip
PROJECTIONS = tuple(
    f"mlp.experts.{expert}.{name}" for expert in range(3) for name in ("gate_proj", "up_proj", "down_proj")
)
MODULES = ("lm_head", *(f"model.layers.{layer}.{name}" for layer in range(2) for name in LINEARS + PROJECTIONS))


def experts_of(module: str) -> str | None:
    """The module of all experts of the layer of a routed expert's projection."""
    match = EXPERT.fullmatch(module)
    return match["experts"] if match else None


def vllm_says(config: dict[str, Any]) -> Callable[[str], str]:
    """What vLLM makes of each module, under our names."""
    quark = QuarkConfig.from_config(copy.deepcopy(config))

    @cache
    def scheme(name: str, layer: type) -> str:
        try:
            weight, activation, method = quark.get_quant_method_target(name, layer)
        except (NotImplementedError, RuntimeError, ValueError, AttributeError):  # a scheme that it does not know
            return OTHER
        if method is not None and method.__name__.startswith("Unquantized"):
            return FLOAT
        if method is QuarkLinearMethod and quark.get_scheme_cls(layer, name)[2] is not QuarkW8A8Int8:
            return OTHER
        if method not in (QuarkLinearMethod, QuarkW8A8Int8MoEMethod):
            return OTHER
        return KEYS.get((weight, activation), OTHER)

    return lambda module: scheme(
        experts_of(module) or module, RoutedExperts if experts_of(module) else ReplicatedLinear
    )


def we_say(config: dict[str, Any]) -> Callable[[str], str]:
    """What we read of each module."""
    declared = declared_scheme(config)
    assert declared is not None

    def scheme(module: str) -> str:
        resolved = declared.resolve(module)
        return FLOAT if resolved.weight is None else SCHEME_NAMES.get(resolved, OTHER)

    return scheme


# --- the differences


def _first_key(config: dict[str, Any], name: str) -> str | None:
    return next((key for key in config["layer_quant_config"] if fnmatchcase(name, key)), None)


def _globs_in_exclude(config: dict[str, Any], module: str) -> bool:
    globs = [entry for entry in config["exclude"] if not entry.startswith("re:") and re.search(r"[*?[]", entry)]
    return any(fnmatchcase(module, entry) or module == entry for entry in globs)


def _some_experts_excluded(config: dict[str, Any], module: str) -> bool:
    experts = experts_of(module)
    return experts is not None and any(
        entry.startswith(experts) and entry != module for entry in config["exclude"] if not entry.startswith("re:")
    )


def _regex_on_experts(config: dict[str, Any], module: str) -> bool:
    experts = experts_of(module)
    patterns = [re.compile(entry[3:]) for entry in config["exclude"] if entry.startswith("re:")]
    return experts is not None and any(
        bool(pattern.match(module)) != bool(pattern.match(experts)) for pattern in patterns
    )


def _keys_of_single_experts(config: dict[str, Any], module: str) -> bool:
    experts = experts_of(module)
    return experts is not None and _first_key(config, module) != _first_key(config, experts)


def _keys_without_star(config: dict[str, Any], module: str) -> bool:
    name = experts_of(module) or module
    plain = [key for key in config["layer_quant_config"] if "*" not in key]
    return any((name in key) != fnmatchcase(module, key) for key in plain)


def _types(config: dict[str, Any], module: str) -> bool:  # noqa: ARG001
    return "Linear" in (config["layer_type_quant_config"] or {})


def _null_weight(config: dict[str, Any], module: str) -> bool:
    key = _first_key(config, module)
    layer = config["layer_quant_config"][key] if key else config["global_quant_config"]
    return layer["weight"] is None


def _channels_and_static(config: dict[str, Any], module: str) -> bool:
    key = _first_key(config, module)
    layer = config["layer_quant_config"][key] if key else config["global_quant_config"]
    weight, inputs = layer["weight"], layer["input_tensors"]
    if not isinstance(weight, dict) or not isinstance(inputs, dict) or inputs["is_dynamic"]:
        return False
    return (weight["dtype"], weight["qscheme"], inputs["qscheme"]) == ("int8", "per_channel", "per_tensor")


DIFFERENCES: dict[str, Callable[[dict[str, Any], str], bool]] = {
    "fnmatch patterns in exclude": _globs_in_exclude,
    "some experts of a layer in exclude": _some_experts_excluded,
    "re: patterns that match experts but not the module of all": _regex_on_experts,
    "keys that match experts but not the module of all": _keys_of_single_experts,
    "keys without *": _keys_without_star,
    "layer_type_quant_config": _types,
    "a null weight": _null_weight,
    "scales per channel with static activations": _channels_and_static,
}
"""Where we follow Quark and vLLM does not:

- Quark reads entries of ``exclude`` as fnmatch patterns. vLLM compares them as they are, or as ``re:``, which Quark
  does not know. Quark writes names only.
- vLLM decides once for all experts of a layer: it leaves all in float if ``exclude`` names one, and looks up patterns
  and keys by the name of the module that holds them.
- A key of ``layer_quant_config`` without ``*`` is a name to Quark. vLLM takes it for any module whose name is a part
  of it.
- vLLM looks up ``layer_type_quant_config`` by class and finds nothing, refuses a layer whose weight is null, and
  accepts scales per channel with static activations, of which Quark exports no scales and which we call unsupported.
"""


def unexplained(config: dict[str, Any], modules: tuple[str, ...] | list[str], seen: set[str]) -> list[str]:
    """Modules of which vLLM says another thing than we, for no reason that has a name; ``seen`` gets the names."""
    ours, theirs, unnamed = we_say(config), vllm_says(config), []
    for module in modules:
        if ours(module) == theirs(module):
            continue
        reasons = {name for name, concerns in DIFFERENCES.items() if concerns(config, module)}
        seen |= reasons if len(reasons) == 1 else set()
        if not reasons:
            unnamed.append(f"{module}: we say {ours(module)}, vLLM {theirs(module)}")
    return unnamed


# --- real exports


@pytest.mark.parametrize("name", sorted(FIXTURES | EXPORTS))
def test_real_exports_are_read_as_vllm_does(checkpoints: Checkpoints, name: str) -> None:
    config = json.loads((checkpoints(name) / "config.json").read_text())
    quantization = config.get("quantization_config") or config.get("text_config", {}).get("quantization_config")
    if quantization is None:
        assert name == "qwen3_moe-bf16"
        return
    modules = [module for module in describe(checkpoints(name)).stored.linears if not module.endswith("embed_tokens")]
    seen: set[str] = set()
    assert unexplained(quantization, modules, seen) == []
    assert seen == OF_EXPORTS.get(name, set())


OF_EXPORTS = {
    "qwen3_moe-0.11-eager-channel_weight_static_input": {"scales per channel with static activations"},
    "qwen3_moe-0.11-eager-layer_type": {"layer_type_quant_config"},
    "qwen3_moe-0.13-f2f-exclude_patterns_on_disk": {"fnmatch patterns in exclude"},
    "qwen3_moe-0.13-f2f-experts_per_projection": {"keys that match experts but not the module of all"},
    "qwen3_moe-0.13-f2f-mxfp4_experts": {"keys that match experts but not the module of all"},
    "qwen3_moe-0.13-f2f-some_experts_excluded": {"some experts of a layer in exclude"},
}
"""Export -> the differences that show in it."""


# --- one of each

EXPERT_0, LM_HEAD = "model.layers.0.mlp.experts.0.down_proj", "lm_head"
EXAMPLES: dict[str, tuple[dict[str, Any], str, str, str]] = {
    "fnmatch patterns in exclude": ({"exclude": ["*head"]}, LM_HEAD, FLOAT, "ptpc_int8"),
    "some experts of a layer in exclude": (
        {"exclude": ["model.layers.0.mlp.experts.1.up_proj"]}, EXPERT_0, "ptpc_int8", FLOAT
    ),
    "re: patterns that match experts but not the module of all": (
        {"exclude": [r"re:.*down_proj$"]}, EXPERT_0, FLOAT, "ptpc_int8"
    ),
    "keys that match experts but not the module of all": (
        {"layer_quant_config": {"*.down_proj": layer_config(TENSOR_WEIGHT)}},
        EXPERT_0, "int8_per_tensor_weight", "ptpc_int8",
    ),
    "keys without *": (
        {"layer_quant_config": {"model.lm_head": layer_config(TENSOR_WEIGHT)}},
        LM_HEAD, "ptpc_int8", "int8_per_tensor_weight",
    ),
    "layer_type_quant_config": (
        {"layer_type_quant_config": {"Linear": layer_config(TENSOR_WEIGHT)}},
        LM_HEAD, "int8_per_tensor_weight", "ptpc_int8",
    ),
    "a null weight": ({"layer_quant_config": {"*head": layer_config(None, None)}}, LM_HEAD, FLOAT, OTHER),
    "scales per channel with static activations": (
        {"global_quant_config": layer_config(WEIGHT, STATIC_INPUT)}, LM_HEAD, OTHER, "no name"
    ),
}  # fmt: skip
"""Difference -> a change to a config, a module, what we say of it, what vLLM says."""


@pytest.mark.parametrize("difference", DIFFERENCES)
def test_one_of_each_difference_is_shown(difference: str) -> None:
    changes, module, ours, theirs = EXAMPLES[difference]
    config = quark_config(**changes)
    config["export"]["kv_cache_group"] = []
    assert (we_say(config)(module), vllm_says(config)(module)) == (ours, theirs)
    assert DIFFERENCES[difference](config, module)


# --- generated configs


class Language(NamedTuple):
    """What generated configs may hold."""

    exclude: Callable[[Random], list[str]]
    keys: Callable[[Random], list[str]]
    layers: tuple[dict[str, Any], ...]
    types: bool


FP8 = {**WEIGHT, "dtype": "fp8_e4m3"}
LAYERS = (
    layer_config(),
    layer_config(TENSOR_WEIGHT, INPUT),
    layer_config(TENSOR_WEIGHT, STATIC_INPUT),
    layer_config(FP8, {**INPUT, "dtype": "fp8_e4m3"}),
    layer_config(WEIGHT, None),
    layer_config({**WEIGHT, "symmetric": False}, INPUT),
    layer_config([WEIGHT], [INPUT]),
    layer_config({**WEIGHT, "qscheme": "per_group", "group_size": 32}, INPUT),
)


def _whole_entries(random: Random) -> list[str]:
    """Entries that vLLM reads as we do: names of linears, all experts of a layer, patterns for either."""
    entries = random.sample(MODULES[:8], random.randrange(4)) + random.sample(["not.there", "lm_head.weight"], 1)
    if random.random() < 0.3:
        layer = random.randrange(2)
        entries += [f"model.layers.{layer}.{name}" for name in PROJECTIONS]
    patterns = [r"re:.*\.mlp\.gate$", r"re:model\.layers\.1\.", r"re:.*mlp\.experts", r"re:lm_head", r"re:self_attn",
                r"re:.*self_attn\.[qk]_proj", r"re:.*shared_expert\."]  # fmt: skip
    return entries + random.sample(patterns, random.randrange(3))


def _whole_keys(random: Random) -> list[str]:
    keys = ["*self_attn*", "*.mlp.experts*", "*experts*", "*layers.1.*", "*shared_expert.*", "*.q_proj", "*lm_head",
            "model.layers.0.mlp.*", "*", "*gate", "*.MLP.*", "*layers.[01].self_attn.?_proj*"]  # fmt: skip
    return random.sample(keys, random.randrange(4))


def _any_entries(random: Random) -> list[str]:
    entries = ["*.mlp.gate", "*self_attn*", "*.experts.*", "*.experts.[01].*", "model.layers.?.mlp.gate",
               "model.layers.0.mlp.experts", r"re:.*\.experts\.0\.", r"re:.*down_proj$", "*lm_head",
               *MODULES]  # fmt: skip
    return _whole_entries(random) + random.sample(entries, random.randrange(4))


def _any_keys(random: Random) -> list[str]:
    keys = ["*.experts.*", "*down_proj", "*.experts.1.*", "model.layers.0.mlp.gate_up", "model.layers.?.mlp.gate",
            "model.layers.0.mlp.experts.0.down_proj", "prefix.lm_head", *MODULES[:12]]  # fmt: skip
    mixed = _whole_keys(random) + random.sample(keys, random.randrange(4))
    random.shuffle(mixed)
    return mixed


WHOLE_LANGUAGE = Language(_whole_entries, _whole_keys, LAYERS, types=False)
ANY_LANGUAGE = Language(
    _any_entries, _any_keys, (*LAYERS, layer_config(None, None), layer_config(WEIGHT, STATIC_INPUT)), types=True
)


def generated(language: Language, seed: int) -> dict[str, Any]:
    """A config in a language."""
    random = Random(seed)
    first = random.choices(language.layers, [8] + [1] * (len(language.layers) - 1))[0]
    config = quark_config(
        global_quant_config=first,
        exclude=language.exclude(random),
        layer_quant_config={key: random.choice(language.layers) for key in language.keys(random)},
        layer_type_quant_config={"Linear": random.choice(LAYERS)} if language.types and random.random() < 0.1 else {},
    )
    config["export"]["kv_cache_group"] = []
    return config


def test_generated_configs_without_the_differences_are_read_alike() -> None:
    seen_schemes: set[str] = set()
    for seed in range(CONFIGS):
        config = generated(WHOLE_LANGUAGE, seed)
        ours, theirs = we_say(config), vllm_says(config)
        assert {module: ours(module) for module in MODULES} == {module: theirs(module) for module in MODULES}, config
        seen_schemes.update(map(ours, MODULES))
    assert seen_schemes == {FLOAT, OTHER, *SCHEME_NAMES.values()}


def test_generated_configs_differ_in_the_known_ways_only() -> None:
    seen: set[str] = set()
    for seed in range(CONFIGS):
        config = generated(ANY_LANGUAGE, seed)
        assert unexplained(config, MODULES, seen) == [], config
    assert seen == set(DIFFERENCES)
