"""A model whose family is known: the routing and the activation function of its layers, read from config.json."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

from quarkconv.experts.config_values import (
    Config,
    factor,
    first,
    not_known,
    number,
    of_layer,
    parameter,
    positive_float,
    positive_int,
)
from quarkconv.experts.family import Family
from quarkconv.experts.function import ExpertActivation, Routing, Unknown


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
        other_count = self._other_count(count, layer)
        if other_count is not None:
            return other_count
        hashed = self._hashed_layers()
        if isinstance(hashed, Unknown):
            return hashed
        if hashed and layer is None:
            return Unknown(f"the first {hashed} layers choose experts by token id", rule.hash_layers[0])
        by_token_id = layer is not None and layer < hashed
        top_k, top_k_key = first(self.experts, rule.top_k)
        top_k = of_layer(top_k, layer) if rule.per_layer else top_k
        if (k := positive_int(top_k)) is None:
            return not_known(top_k_key, top_k)
        scale = factor(self.experts, rule.scale, 1.0 if not rule.scale else rule.default_scale)
        floor = factor(self.experts, rule.floor, 0.0)
        order = factor(self.experts, rule.norm_order, 1.0)
        jitter = factor(self.experts, rule.jitter, None if rule.jitter else 0.0)
        input_norm = factor(self.config, ("rms_norm_eps",), None) if rule.normalized_input else 0.0
        for value in (scale, floor, order, jitter, input_norm):
            if isinstance(value, Unknown):
                return value
        zeros, renormalize, groups = self._zero_experts(), self._renormalize(), self._groups(count)
        if isinstance(zeros, Unknown):
            return zeros
        if isinstance(renormalize, Unknown):
            return renormalize
        if isinstance(groups, Unknown):
            return groups
        n_group, topk_group = groups
        # Fewer eligible experts than k would leave the rest of the choice to how topk breaks ties between -inf.
        if k > (count + zeros) // n_group * topk_group:
            return Unknown(f"config.json has {top_k_key} = {k}, more than the experts to choose from", top_k_key)
        if rule.scoring == "sparsemixer" and k != 2:
            return Unknown(f"config.json has {top_k_key} = {k}, but this routing chooses two experts", top_k_key)
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
            bias_name=tensors.correction_bias[0] if tensors.correction_bias and not by_token_id else None,
            by_logits=rule.by_logits,
            floor=number(floor),
            norm_order=number(order),
            softcap=rule.softcap,
            jitter=number(jitter),
            zero_experts=zeros,
            input_norm=number(input_norm) if rule.normalized_input else None,
            on_input=rule.on_input,
            by_token_id=by_token_id,
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

    def _other_count(self, count: int, layer: int | None) -> Unknown | None:
        """A number of experts in the config that is not that of the tensors; None where they agree."""
        rule = self.family.router
        for key in rule.experts:
            stated = of_layer(self.experts.get(key), layer) if rule.per_layer else self.experts.get(key)
            if stated is not None and positive_int(stated) != count:
                return Unknown(f"config.json has {key} = {stated!r}, but the tensors hold {count} experts", key)
        return None

    def _zero_experts(self) -> int | Unknown:
        """How many experts beside the stored ones return their input."""
        zeros, key = first(self.experts, self.family.router.zero_experts)
        if zeros is not None and (isinstance(zeros, bool) or not isinstance(zeros, int) or not 0 <= zeros < 2**20):
            return not_known(key, zeros)
        return zeros or 0

    def _renormalize(self) -> bool | Unknown:
        """Whether the weights of the chosen experts are divided by their sum."""
        rule = self.family.router.renormalize
        value, key = (rule, "") if isinstance(rule, bool) else first(self.experts, rule)
        return value if isinstance(value, bool) else not_known(key, value)

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

    def _hashed_layers(self) -> int | Unknown:
        """How many first layers choose experts by token id."""
        keys = self.family.router.hash_layers
        if not keys:
            return 0
        kinds = self.experts.get("mlp_layer_types")  # transformers' name for the same
        if isinstance(kinds, list):
            hashed = kinds.count("hash_moe")
            return not_known("mlp_layer_types", kinds) if any(kind != "hash_moe" for kind in kinds[:hashed]) else hashed
        stated, key = first(self.experts, keys)
        return stated if type(stated) is int and stated >= 0 else not_known(key, stated)
