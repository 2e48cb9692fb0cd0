"""Routing and function of a model's experts, by its config.json and the table of families.

    knowledge(config) -> Known: the row that holds, with the part of the config that it reads
                         Unknown: why nothing is claimed, with the config key

A config key that changes the function in some family, or that looks as if it did, and that the row does not read makes
a model unknown, because the key may change the computation.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from functools import cache
from typing import Final, NamedTuple

from quarkconv.experts.config import model_config
from quarkconv.experts.config_values import (
    Config,
    factor,
    first,
    is_one_of,
    not_known,
    number,
    of_layer,
    parameter,
    positive_float,
    positive_int,
    short,
)
from quarkconv.experts.families import FAMILIES
from quarkconv.experts.family import Family, Setting
from quarkconv.experts.function import ExpertActivation, Routing, Unknown

_LOOKS_RELEVANT: Final = re.compile(
    r"swiglu|situ_|latent_moe|moe_latent|router|routing|routed|zero_expert|hash_layers|hash_moe|norm_topk|(^|_)renorm"
    r"|expert_bias|on_input|gate_act|topk_method|score_func|scoring_func|(^|_)hidden_act(ivation)?$|(^|_)act_fn$"
    r"|expert_act"
)
_HARMLESS: Final = frozenset(
    {
        "output_router_logits", "router_aux_loss_coef", "router_z_loss_coef", "router_jitter_noise",
        "input_jitter_noise", "mamba_hidden_act", "moe_router_dtype", "router_dtype", "moe_router_fp32",
    }
)  # fmt: skip
"""Keys that matter in training only, to other modules, or to the precision of the router."""
_NEUTRAL: Final[Mapping[str, tuple[Setting, ...]]] = {
    "routed_scaling_factor": (1, 1.0), "n_group": (1,), "topk_group": (1,), "num_expert_group": (1,),
    "hidden_act": ("silu",),
}  # fmt: skip
"""Values that change nothing where a row does not read the key, besides null, false, 0 and what is empty."""
_RENORMALIZE: Final = frozenset({"norm_topk_prob", "moe_renormalize"})
"""Keys that must then say what the row does."""
_WATCHED: Final = frozenset(key for family in FAMILIES for key in family.understood()) - frozenset(
    key for family in FAMILIES for key in (*family.router.experts, *family.router.top_k)
)


class Known(NamedTuple):
    """A model whose family is known.

    Attributes:
        model_type: its type, without an ending ``_text``.
        family: the row that holds.
        config: the part of config.json about its language model.
        experts: the part of that about its experts; mostly the same.
    """

    model_type: str
    family: Family
    config: Config
    experts: Config

    def routing(self, count: int, layer: int | None = None) -> Routing | Unknown:
        """The routing of a layer with `count` routed experts.

        Args:
            count: E, counted from the stored tensors.
            layer: number of the layer, where settings differ between layers; None for any.
        """
        rule = self.family.router
        config = self.experts
        for key in rule.experts:
            stated = of_layer(config.get(key), layer) if rule.per_layer else config.get(key)
            if stated is not None and positive_int(stated) != count:
                return Unknown(f"config.json says {key} = {stated!r}, the tensors are of {count} experts", key)
        if rule.hash_layers and (reason := self._hash_layer(layer)) is not None:
            return reason
        top_k, top_k_key = first(config, rule.top_k)
        top_k = of_layer(top_k, layer) if rule.per_layer else top_k
        if (k := positive_int(top_k)) is None:
            return not_known(top_k_key, top_k)
        scale = factor(config, rule.scale, 1.0 if not rule.scale else rule.default_scale)
        floor = factor(config, rule.floor, 0.0)
        order = factor(config, rule.norm_order, 1.0)
        jitter = factor(config, rule.jitter, None if rule.jitter else 0.0)
        input_norm = factor(self.config, ("rms_norm_eps",), None) if rule.normalized_input else 0.0
        zeros, zeros_key = first(config, rule.zero_experts)
        for value in (scale, floor, order, jitter, input_norm):
            if isinstance(value, Unknown):
                return value
        if zeros is not None and (isinstance(zeros, bool) or not isinstance(zeros, int) or not 0 <= zeros < 2**20):
            return not_known(zeros_key, zeros)
        renormalize, key = (
            (rule.renormalize, "") if isinstance(rule.renormalize, bool) else first(config, rule.renormalize)
        )
        if not isinstance(renormalize, bool):
            return not_known(key, renormalize)
        groups = self._groups(count)
        if isinstance(groups, Unknown):
            return groups
        n_group, topk_group = groups
        # Fewer eligible experts than k would leave the rest of the choice to how topk breaks ties between -inf.
        if k > (count + (zeros or 0)) // n_group * topk_group:
            return Unknown(f"config.json says {top_k_key} = {k}, more than the experts to choose from", top_k_key)
        if rule.scoring == "sparsemixer" and k != 2:
            return Unknown(f"config.json says {top_k_key} = {k}, and this routing is of two experts", top_k_key)
        tensors = self.family.tensors
        return Routing(
            model_type=self.model_type,
            scoring=rule.scoring,
            experts=count,
            top_k=k,
            renormalize=renormalize,
            scaling_factor=number(scale),
            epsilon=rule.epsilon,
            n_group=n_group,
            topk_group=topk_group,
            group_score=rule.group_score or "top2",
            bias_name=tensors.correction_bias[0] if tensors.correction_bias else None,
            by_logits=rule.by_logits,
            floor=number(floor),
            norm_order=number(order),
            softcap=rule.softcap,
            jitter=number(jitter),
            zero_experts=zeros or 0,
            input_norm=number(input_norm) if rule.normalized_input else None,
            on_input=rule.on_input,
            tensors=tensors,
        )

    def activation(self, layer: int) -> ExpertActivation | Unknown:
        """The activation function of the experts of a layer."""
        rule = self.family.activation
        stated, key = first(self.experts, rule.keys)
        if isinstance(stated, Mapping):  # dbrx: {"name": "silu"}
            stated = stated.get("name")
        name = rule.default if stated is None else rule.names.get(stated) if isinstance(stated, str) else None
        if name is None:
            return not_known(key, stated)
        alpha = parameter(self.experts, rule.alpha, rule.default_alpha) if name == "swigluoai" else None
        beta = parameter(self.experts, rule.beta, rule.default_beta) if name == "situ" else None
        linear = parameter(self.experts, rule.linear_beta, 0.0) if name == "situ" else None
        limit = self._limit(layer)
        for value in (alpha, beta, linear, limit):
            if isinstance(value, Unknown):
                return value
        if rule.limit_list and limit:
            name = rule.limited
        numbers = [None if not value else number(value) for value in (limit, alpha, beta, linear)]
        return ExpertActivation(name, *numbers)

    def hidden_size(self) -> int | None:
        """Width of the experts' input where it is not that of the model; None where it is."""
        return positive_int(first(self.experts, self.family.latent)[0])

    def _limit(self, layer: int) -> float | Unknown | None:
        rule = self.family.activation
        if rule.limit:
            return parameter(self.experts, rule.limit, rule.default_limit)
        limits, key = first(self.experts, rule.limit_list)
        if limits is None:
            return None
        if not isinstance(limits, list):
            return not_known(key, limits)
        stated = limits[layer] if layer < len(limits) else None
        if stated is None or (type(stated) in (int, float) and stated == 0):
            return None
        return value if (value := positive_float(stated)) is not None else not_known(key, limits)

    def _groups(self, count: int) -> tuple[int, int] | Unknown:
        """(n_group, topk_group), (1, 1) for a choice among all experts."""
        rule = self.family.router
        if rule.group_score is None:
            return 1, 1
        if rule.grouped_when is not None and self.experts.get(rule.grouped_when[0]) != rule.grouped_when[1]:
            return 1, 1
        stated, key = first(self.experts, rule.n_group)
        kept, kept_key = first(self.experts, rule.topk_group)
        n_group, topk_group = positive_int(stated), positive_int(kept)
        if n_group is None or count % n_group or (rule.group_score == "top2" and n_group > 1 and count // n_group < 2):
            return not_known(key, stated)
        if topk_group is None or topk_group > n_group:
            return not_known(kept_key, kept)
        return n_group, topk_group

    def _hash_layer(self, layer: int | None) -> Unknown | None:
        """The reason why a layer's routing is not computed: it uses token ids, or may."""
        kinds = self.experts.get("mlp_layer_types")  # transformers' name for the same
        if isinstance(kinds, list):
            hashed = kinds.count("hash_moe")
            if any(kind != "hash_moe" for kind in kinds[:hashed]):
                return not_known("mlp_layer_types", kinds)
        else:
            stated, key = first(self.experts, self.family.router.hash_layers)
            if type(stated) is not int or stated < 0:
                return not_known(key, stated)
            hashed = stated
        if hashed and (layer is None or layer < hashed):
            return Unknown(f"the first {hashed} layers choose experts by token id", self.family.router.hash_layers[0])
        return None


def knowledge(config: object, module: str = "") -> Known | Unknown:
    """The family of a model, or why it is unknown.

    Args:
        config: the parsed config.json.
        module: a module of the layer in question, for models of several stacks of layers: ``thinker.model.layers.0``.
    """
    if not isinstance(config, Mapping):
        return Unknown("config.json is not an object")
    section = model_config(config).part_of(module)
    stated = section.get("model_type", config.get("model_type"))
    if not isinstance(stated, str):
        return Unknown("config.json says no model_type", "model_type")
    model_type = stated.removesuffix("_text")
    rows = [row for row in FAMILIES if model_type in row.types and _is_architecture(row, section, config)]
    if not rows:
        return Unknown(f"the model type {stated} is not known")
    row = min(rows, key=lambda row: sum(1 for _ in _contradicted(row, section)))
    contradicted = next(_contradicted(row, section), None) or next(_not_understood(row, section), None)
    return contradicted or Known(model_type, row, section, _experts(row, section))


def expert_activation(config: object, layer: int, module: str = "") -> ExpertActivation | Unknown:
    """The activation function of the experts of a layer, or why it is unknown.

    Args:
        config: the parsed config.json.
        layer: number of the layer: some models clamp in some layers only.
        module: as of :func:`knowledge`.
    """
    known = knowledge(config, module)
    return known if isinstance(known, Unknown) else known.activation(layer)


def families(config: object) -> Callable[[str], Family | None]:
    """Gives the family of the stack of layers that a module belongs to; None where it is not known."""

    @cache
    def of_stack(stack: str) -> Family | None:
        known = knowledge(config, stack)
        return None if isinstance(known, Unknown) else known.family

    return lambda module: of_stack(module.partition(".")[0])


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
            yield Unknown(f"config.json says {' and '.join(f'{k} = {short(v)}' for k, v in stated.items())}", keys[0])
    for key, value in _experts(row, section).items():
        if key in understood or key in _HARMLESS or not isinstance(key, str):
            continue
        relevant = key in _WATCHED or _LOOKS_RELEVANT.search(key) is not None
        neutral = value is None or value is divides if key in _RENORMALIZE else _is_neutral(key, value)
        if relevant and not neutral:
            yield Unknown(f"config.json says {key} = {short(value)}, whose effect is not known", key)


def _is_architecture(row: Family, section: Config, config: Config) -> bool:
    if not row.architectures:
        return True
    stated = section.get("architectures", config.get("architectures"))
    return isinstance(stated, list) and any(name in stated for name in row.architectures)


def _is_neutral(key: str, value: object) -> bool:
    if isinstance(value, list):
        return all(_is_neutral(key, item) for item in value)
    return value is None or value is False or value in (0, "", {}) or is_one_of(value, _NEUTRAL.get(key, ()))
