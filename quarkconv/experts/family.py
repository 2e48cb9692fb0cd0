"""A row of the table of families: routing and function of the experts of one kind of model.

A row names config keys; :mod:`quarkconv.experts.knowledge` reads a config.json with it. All of it is data.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Final, Literal, NamedTuple

Keys = tuple[str, ...]
"""Config keys of one setting: a model's first code, transformers and engines name some of them differently."""
Setting = str | bool | int | float | None

Scoring = Literal["softmax", "sigmoid", "sqrtsoftplus", "sparsemixer"]
GroupScore = Literal["max", "top2"]
ActivationName = Literal["silu", "swiglustep", "gelu", "gelu_tanh", "relu2", "swigluoai", "situ"]

_HEAD: Final = re.compile(r"(?:Text)?(?:For[A-Z]\w*|Model\w*|LMHeadModel|ChatModel)$")
"""End of the name of a class, which says what head it has."""
_OTHER: Final = re.compile(r"[^a-z0-9]")

EXPERT_COUNT: Final[Keys] = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


class RouterRule(NamedTuple):
    """The routing of a family.

    Attributes:
        scoring: from logits to scores. ``sqrtsoftplus`` is sqrt(softplus(x)); ``sparsemixer`` chooses two experts
            in sequence, each by a softmax over the logits near the best.
        renormalize: whether the chosen scores are divided by their sum, or the keys that say so.
        by_logits: the k largest logits are chosen, and only these get a score.
        top_k, experts: keys of k and E.
        scale: keys of the factor on the weights; `default_scale` where config.json does not say one, None: it must.
        epsilon: added to the divisor.
        floor: key of the least divisor.
        norm_order: key of p, for a division by the p-norm; null there means no division.
        softcap: c, for logits c * tanh(logits / c).
        jitter: key of the half width of the logits that sparsemixer keeps.
        group_score: how a group of experts is ranked: by its best or by the sum of its best two; None without groups.
        grouped_when: (key, value) with which groups are used; None: always.
        n_group, topk_group: keys of the number of groups and of those that are kept.
        zero_experts: key of the number of experts without weights, which return their input.
        hash_layers: key of the number of first layers that route by token id.
        normalized_input: the router sees RMS-normalized hidden states, times a scale, over sqrt(H).
        on_input: the weight multiplies the expert's input, not its output.
        per_layer: k and E may be lists with an entry for each layer.
    """

    scoring: Scoring
    renormalize: bool | Keys
    by_logits: bool = False
    top_k: Keys = ("num_experts_per_tok",)
    experts: Keys = EXPERT_COUNT
    scale: Keys = ()
    default_scale: float | None = None
    epsilon: float = 0.0
    floor: Keys = ()
    norm_order: Keys = ()
    softcap: float | None = None
    jitter: Keys = ()
    group_score: GroupScore | None = None
    grouped_when: tuple[str, str] | None = None
    n_group: Keys = ("n_group",)
    topk_group: Keys = ("topk_group",)
    zero_experts: Keys = ()
    hash_layers: Keys = ()
    normalized_input: bool = False
    on_input: bool = False
    per_layer: bool = False

    def settings(self) -> Iterator[Keys]:
        """The keys of every setting that the rule reads."""
        yield from (self.top_k, self.experts, self.scale, self.floor, self.norm_order, self.jitter)
        yield from (self.zero_experts, self.hash_layers)
        if not isinstance(self.renormalize, bool):
            yield self.renormalize
        if self.group_score is not None:
            yield from (self.n_group, self.topk_group)
        if self.grouped_when is not None:
            yield (self.grouped_when[0],)


class RouterTensors(NamedTuple):
    """Names of a router's tensors below the module that holds the experts; several where exports differ, () for none.

    Attributes:
        weight: [E, H].
        correction_bias: [E], added to the scores to choose by.
        logit_bias: [E], added to the logits.
        input_scale: [H], on the normalized input.
        expert_scale: [E], on the weights.
        token_ids: [vocabulary, k], the experts of each token id in layers that route by it.
        transposed: the weight is stored [H, E].
    """

    weight: Keys = ("gate.weight",)
    correction_bias: Keys = ()
    logit_bias: Keys = ()
    input_scale: Keys = ()
    expert_scale: Keys = ()
    token_ids: Keys = ()
    transposed: bool = False


class ActivationRule(NamedTuple):
    """The function of a family between the two products of an expert.

    Attributes:
        keys: config keys that name the function.
        names: their value -> our name; any other value is unknown.
        default: our name where config.json does not say; None: it must.
        limit, alpha, beta, linear_beta: keys of the parameters, of which the first found counts.
        default_limit, default_alpha, default_beta: defaults where config.json has no value; a limit of 0: unlimited.
        limit_list: key of a limit for each layer, 0 or null for none.
        limited: what such a limit makes of the function.
    """

    keys: Keys = ("hidden_act",)
    names: Mapping[str, ActivationName] = {"silu": "silu", "swish": "silu"}
    default: ActivationName | None = "silu"
    limit: Keys = ()
    default_limit: float | None = None
    alpha: Keys = ()
    default_alpha: float | None = None
    beta: Keys = ()
    default_beta: float | None = None
    linear_beta: Keys = ()
    limit_list: Keys = ()
    limited: ActivationName = "swiglustep"

    def settings(self) -> Iterator[Keys]:
        """The keys of every setting that the rule reads."""
        yield from (self.keys, self.limit, self.alpha, self.beta, self.linear_beta, self.limit_list)


class EngineFloat(NamedTuple):
    """Linears that one engine alone keeps in float; the others run them in int8.

    Attributes:
        engine: the engine, as the table of engines names it: ``sglang``.
        name: end of the linears' names.
        beside: last part of the name of a module that is stored beside them; empty where none is needed.
        mtp: whether only those in layers of multi-token prediction are meant.
    """

    engine: str
    name: str
    beside: str = ""
    mtp: bool = False


class Family(NamedTuple):
    """Models whose experts are chosen and computed alike.

    Attributes:
        types: values of ``model_type``, without an ending ``_text``.
        router: how experts are chosen.
        tensors: the router's tensors.
        activation: the activation function of an expert.
        source: where it is read: file and class.
        architectures: one of them is needed in ``architectures`` where the type is shared with other models.
        classes: starts of the names of its classes where they are other than a type, such as ``DeepseekV3``.
        part: object below the language model's config that describes the experts.
        fixed: config key -> the values under which this row holds; None stands for absent or null.
        gated: False for experts with up and down only.
        biased: the projections of an expert have biases.
        interleaved: rows of gate and up alternate in a tensor that has both.
        latent: keys of the experts' hidden width where it is not the model's.
        ignored: config keys that look as if they mattered and do not, for routed experts at inference.
        float_modules: modules, besides routers and lm_head, that engines never run in int8.
        float_in_one_engine: linears that one engine alone never runs in int8.
        own_scales: last parts of names of parameters of the model that look like a quantizer's scale.
    """

    types: tuple[str, ...]
    router: RouterRule
    source: str
    tensors: RouterTensors = RouterTensors()
    activation: ActivationRule = ActivationRule()
    architectures: tuple[str, ...] = ()
    classes: tuple[str, ...] = ()
    part: str | None = None
    fixed: Mapping[str, tuple[Setting, ...]] = {}
    gated: bool = True
    biased: bool = False
    interleaved: bool = False
    latent: Keys = ()
    ignored: Keys = ()
    float_modules: tuple[str, ...] = ()
    float_in_one_engine: tuple[EngineFloat, ...] = ()
    own_scales: tuple[str, ...] = ()

    def has_class(self, name: str) -> bool:
        """Whether a name in ``architectures`` is that of one of its classes, with any head."""
        known = (*self.types, *self.classes, *(_HEAD.sub("", known) for known in self.architectures))
        return _plain(_HEAD.sub("", name)) in {_plain(start) for start in known}

    def settings(self) -> Iterator[Keys]:
        """The keys of every setting that the row reads."""
        yield from self.router.settings()
        yield from self.activation.settings()
        yield self.latent

    def understood(self) -> frozenset[str]:
        """Every config key that the row reads, or knows not to matter."""
        return frozenset({key for keys in self.settings() for key in keys} | {*self.fixed, *self.ignored})

    def in_float(self, module: str) -> bool:
        """Whether engines keep a module in float: a router, or another that they never quantize."""
        return module.endswith(tuple(f".{name}" for name in self.in_float_names()))

    def in_float_names(self) -> tuple[str, ...]:
        """Ends of the names of these modules."""
        return (*(name.removesuffix(".weight") for name in self.tensors.weight), *self.float_modules)


def _plain(name: str) -> str:
    """A name in lower case, without other characters than letters and digits."""
    return _OTHER.sub("", name.lower())


FamilyOf = Callable[[str], Family | None]
"""Gives the family of models that a module belongs to; None where it is not known."""
