"""Routing and function of a model's experts, by its config.json and the table of families.

    knowledge(config) -> Known: the row that holds, with the part of the config that it reads
                         Unknown: why nothing is claimed, with the config key

A config key that changes the function in some family, or that looks as if it did, and that the row does not read makes
a model unknown, because the key may change the computation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final

from quarkconv.experts.config import ModelConfig, model_config, stack_of
from quarkconv.experts.config_values import Config, is_one_of, not_known, short
from quarkconv.experts.families import FAMILIES
from quarkconv.experts.family import EngineFloat, Family, FamilyOf, Setting
from quarkconv.experts.function import ExpertActivation, Routing, Unknown
from quarkconv.experts.known import Known
from quarkconv.experts.layer import MoELayer

_LOOKS_RELEVANT: Final = re.compile(
    r"swiglu|situ_|latent_moe|moe_latent|router|routing|routed|zero_expert|hash_layers|hash_moe|norm_topk|(^|_)renorm"
    r"|expert_bias|on_input|gate_act|topk_method|score_func|scoring_func|(^|_)hidden_act(ivation)?$|(^|_)act_fn$"
    r"|expert_act|(^|_)activation(_fn|_function)?$|activation_(alpha|beta|limit|clamp)"
    r"|(moe|expert)_(\w+_)?(alpha|beta|limit|clamp|scale|scaling\w*|multiplier)$"
)
_HARMLESS: Final = frozenset(
    {
        "output_router_logits", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise",
        "input_jitter_noise", "mamba_hidden_act", "moe_router_dtype", "router_dtype", "moe_router_fp32",
    }
)  # fmt: skip
"""Keys that matter in training only, as all with ``loss`` do, to other modules, or to the precision of the router."""
_NEUTRAL: Final[Mapping[str, tuple[Setting, ...]]] = {
    r"^routed_scaling_factor$|(scale|multiplier)$": (1, 1.0),
    r"^(n_group|topk_group|num_expert_group)$": (1,),
    r"(^|_)(act|act_fn|activation(_fn|_function)?)$": ("silu",),
}
"""Pattern of keys -> values that change nothing where a row does not read the key, besides null, false, 0 and what is
empty."""
_RENORMALIZE: Final = frozenset({"norm_topk_prob", "moe_renormalize"})
"""Keys that must then say what the row does."""
_WATCHED: Final = frozenset(key for family in FAMILIES for key in family.understood()) - frozenset(
    key for family in FAMILIES for key in (*family.router.experts, *family.router.top_k)
)


def knowledge(config: object, module: str = "") -> Known | Unknown:
    """The family of a model, or why it is unknown.

    Args:
        config: the parsed config.json.
        module: a module of the layer in question, for models of several stacks of layers: ``thinker.model.layers.0``.
    """
    if not isinstance(config, Mapping):
        return Unknown("config.json is not an object")
    if not config:
        return Unknown("config.json is missing, empty, or cannot be read", "model_type")
    found = model_config(config)
    section = found.part_of(module)
    if section is None:
        return Unknown(f"config.json does not describe the layers of {stack_of(module)}")
    stated = _stated_type(found, section)
    if not isinstance(stated, str):
        return Unknown("config.json has no model_type", "model_type")
    model_type, rows = stated.removesuffix("_text"), _rows(found, section)
    if not rows:
        return Unknown(f"the model type {stated} is not known")
    named = foreign_class(found) if section is found.text else None
    if named is not None:
        reason = f"config.json names the class {short(named)}, which is not a class of model type {stated}"
        return Unknown(reason, "architectures")
    row = min(rows, key=lambda row: sum(1 for _ in _contradicted(row, section)))
    contradicted = next(_contradicted(row, section), None) or next(_not_understood(row, section), None)
    return contradicted or Known(model_type, row, section, _experts(row, section))


def foreign_class(config: ModelConfig) -> str | None:
    """The first class in ``architectures`` where none is one of the model type; None where one is, or none is named.

    Engines choose a class by ``architectures``. Of model types without a row, and of other models around a language
    model, the classes are not known.
    """
    model_type, names = config.raw.get("model_type"), named_classes(config)
    if not isinstance(model_type, str) or not names:
        return None
    rows = [row for row in FAMILIES if model_type.removesuffix("_text") in row.types]
    known = not rows or any(row.has_class(name) for row in rows for name in names)
    return None if known else names[0]


def named_classes(config: ModelConfig) -> list[str]:
    """The classes in ``architectures``."""
    named = config.raw.get("architectures")
    return [name for name in named if isinstance(name, str)] if isinstance(named, list) else []


def class_of_another_type(config: ModelConfig) -> str | None:
    """:func:`foreign_class`, where it is one of another model type that is known; else None."""
    name = foreign_class(config)
    return name if name is not None and any(row.has_class(name) for row in FAMILIES) else None


def knowledge_by_stack(config: object) -> Callable[[str], Known | Unknown]:
    """:func:`knowledge` of any module, read once for each stack of layers."""
    first: dict[str, Known | Unknown] = {}

    def known_of(module: str) -> Known | Unknown:
        stack = stack_of(module)
        found = first.get(stack)
        if found is None:
            found = first[stack] = knowledge(config, module)
        return found

    return known_of


def families(config: object) -> FamilyOf:
    """Gives the family of the stack of layers that a module belongs to; None where it is not known."""
    known_of = knowledge_by_stack(config)

    def family_of(module: str) -> Family | None:
        known = known_of(module)
        return None if isinstance(known, Unknown) else known.family

    return family_of


def float_in_one_engine(config: ModelConfig) -> Callable[[str], tuple[EngineFloat, ...]]:
    """Gives the linears that one engine alone keeps in float in the stack of layers that a module belongs to.

    These are facts about classes of engines, so they hold for the model type whatever its settings.
    """
    if foreign_class(config) is not None:
        return lambda _: ()
    first: dict[str, tuple[EngineFloat, ...]] = {}

    def rules_of(module: str) -> tuple[EngineFloat, ...]:
        stack = stack_of(module)
        if stack not in first:
            section = config.part_of(module)
            rows = [] if section is None else _rows(config, section)
            first[stack] = tuple(dict.fromkeys(rule for row in rows for rule in row.float_in_one_engine))
        return first[stack]

    return rules_of


def layer_activation(known: Known | Unknown, layer: MoELayer) -> ExpertActivation | Unknown:
    """The activation function of the experts of a layer, or why it is unknown.

    The config alone does not decide it: experts may have a gate, biases or tensors that models of their type lack.
    """
    activation = known if isinstance(known, Unknown) else known.activation(layer.index)
    if isinstance(known, Unknown) or isinstance(activation, Unknown):
        return activation
    if layer.beside:
        return Unknown(f"{layer.beside} is among the experts, and its meaning is unknown")
    for what, stored, expected in (
        ("a gate", layer.gated, activation.gated),
        ("biases", layer.biased, known.family.biased),
    ):
        if stored != expected:
            have, do_not = ("have", "do not") if stored else ("have no", "do")
            what = what if stored else what.removeprefix("a ")
            return Unknown(f"the experts {have} {what}; experts of model type {known.model_type} {do_not}")
    return activation


def layer_routing(known: Known | Unknown, layer: MoELayer) -> Routing | Unknown:
    """The routing of a layer, or why it is unknown."""
    if layer.beside_router and not isinstance(known, Unknown):
        return Unknown(f"{layer.beside_router} is among the router's tensors, and its meaning is unknown")
    return known if isinstance(known, Unknown) else known.routing(layer.experts, layer.index)


def expert_activation(config: object, layer: MoELayer) -> ExpertActivation | Unknown:
    """:func:`layer_activation` by the parsed config.json."""
    return layer_activation(knowledge(config, layer.moe), layer)


def expert_routing(config: object, layer: MoELayer) -> Routing | Unknown:
    """:func:`layer_routing` by the parsed config.json."""
    return layer_routing(knowledge(config, layer.moe), layer)


def _stated_type(config: ModelConfig, section: Config) -> object:
    """The model type of a part of config.json, ``_text`` at its end included."""
    return section.get("model_type", config.raw.get("model_type") if section is config.text else None)


def _rows(config: ModelConfig, section: Config) -> list[Family]:
    """The rows of the model type of a part of config.json, whatever its settings."""
    stated = _stated_type(config, section)
    if not isinstance(stated, str):
        return []
    model_type = stated.removesuffix("_text")
    return [row for row in FAMILIES if model_type in row.types and _is_architecture(row, section, config.raw)]


def _experts(row: Family, section: Config) -> Config:
    """The part of the language model's config about the experts."""
    nested = section if row.part is None else section.get(row.part)
    return nested if isinstance(nested, Mapping) else {}


def _contradicted(row: Family, section: Config) -> Iterator[Unknown]:
    """Settings that are not the row's."""
    if row.part is not None and not isinstance(section.get(row.part), Mapping):
        yield not_known(row.part, section.get(row.part))
    experts = _experts(row, section)
    for key, allowed in row.fixed.items():
        if not is_one_of(experts.get(key), allowed):
            yield not_known(key, experts.get(key))


def _not_understood(row: Family, section: Config) -> Iterator[Unknown]:
    """Settings that may matter, and that the row does not read."""
    understood = row.understood()
    rule = row.router
    divides = rule.renormalize is True or (rule.by_logits and rule.scoring == "softmax")
    for keys in row.settings():
        stated = {key: value for key in keys if (value := _experts(row, section).get(key)) is not None}
        if any(value != next(iter(stated.values())) for value in stated.values()):
            yield Unknown(f"config.json has {' and '.join(f'{k} = {short(v)}' for k, v in stated.items())}", keys[0])
    for key, value in _experts(row, section).items():
        if not isinstance(key, str) or key in understood or key in _HARMLESS or "loss" in key:
            continue
        if key not in _WATCHED and _LOOKS_RELEVANT.search(key) is None:
            continue
        neutral = value is None or value is divides if key in _RENORMALIZE else _is_neutral(key, value)
        if not neutral:
            yield Unknown(f"config.json has {key} = {short(value)}, whose effect is unknown", key)


def _is_architecture(row: Family, section: Config, config: Config) -> bool:
    if not row.architectures:
        return True
    stated = section.get("architectures", config.get("architectures"))
    return isinstance(stated, list) and any(name in stated for name in row.architectures)


def _is_neutral(key: str, value: object) -> bool:
    if isinstance(value, list):  # an entry for each layer; or numbers of layers, of which 0 is one
        return not value or (not key.endswith("layers") and all(_is_neutral(key, item) for item in value))
    neutral = next((values for pattern, values in _NEUTRAL.items() if re.search(pattern, key)), ())
    return value is None or value is False or value in (0, "", {}) or is_one_of(value, neutral)
