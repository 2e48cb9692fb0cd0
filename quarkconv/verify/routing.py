"""The model's own expert routing, from config.json and the router's stored tensors alone.

Shapes: M tokens, H hidden size, E routed experts, k experts per token, G groups of E / G experts.

    logits  = hidden_states @ weight.T                 [M, E], in float32
    scores  = softmax(logits) or sigmoid(logits)       [M, E]
    choice  = scores + bias                            [M, E]; -inf outside the best `topk_group` of G groups
    ids     = the k largest of choice                  [M, k]
    weights = scores[ids], over their sum, times the scaling factor: the bias decides who, never how much

A family of models is one row of `_FAMILIES`; where two implementations of it disagree about a setting, that setting is
refused rather than guessed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F

Scoring = Literal["softmax", "sigmoid"]
GroupScore = Literal["max", "top2"]
Setting = str | bool | None


@dataclass(frozen=True, slots=True)
class Routing:
    """How the MoE layers of one model choose and weigh experts.

    `n_group` is 1 where the choice is not limited to groups. `group_score` ranks groups by their best expert ("max")
    or by the sum of their best two ("top2"). `epsilon` is what the model adds to the sum that it divides by.
    `bias_name` is the correction bias below the MoE module, None where the model has none.
    """

    model_type: str
    scoring: Scoring
    experts: int
    top_k: int
    renormalize: bool
    scaling_factor: float = 1.0
    epsilon: float = 0.0
    n_group: int = 1
    topk_group: int = 1
    group_score: GroupScore = "top2"
    bias_name: str | None = None

    @property
    def has_correction_bias(self) -> bool:
        return self.bias_name is not None

    def describe(self) -> str:
        """One line for people.

        >>> Routing("deepseek_v3", "sigmoid", 8, 4, True, 2.5, n_group=4, topk_group=2, bias_name="gate.b").describe()
        'sigmoid + correction bias, top 4 of 8 in 2 of 4 groups, renormalised, x2.5'
        """
        parts = [
            self.scoring + (" + correction bias" if self.has_correction_bias else ""),
            f"top {self.top_k} of {self.experts}"
            + (f" in {self.topk_group} of {self.n_group} groups" if self.n_group > 1 else ""),
            "renormalised" if self.renormalize else "not renormalised",
        ]
        if self.scaling_factor != 1.0:
            parts.append(f"x{self.scaling_factor:g}")
        return ", ".join(parts)


@dataclass(frozen=True, slots=True)
class _Family:
    """One routing, and the config keys that set it.

    `fixed`: what these keys may say, None standing for absent or null; any other value means some other routing.
    `grouped_when`: the key and value with which groups are used; None where they always are.
    """

    scoring: Scoring
    renormalize: bool | str  # a string is the config key that says
    epsilon: float = 0.0
    top_k_key: str = "num_experts_per_tok"
    scale_key: str | None = None
    bias_name: str | None = None
    group_score: GroupScore | None = None
    grouped_when: tuple[str, str] | None = None
    fixed: Mapping[str, tuple[Setting, ...]] = field(default_factory=dict)


_SOFTMAX = _Family("softmax", renormalize="norm_topk_prob")
# The two keys are those of the model's first, remote code; configs that transformers 5 writes lack both.
_DEEPSEEK_V3 = _Family(
    "sigmoid",
    renormalize="norm_topk_prob",
    epsilon=1e-20,
    scale_key="routed_scaling_factor",
    bias_name="gate.e_score_correction_bias",
    group_score="top2",
    fixed={"scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")},
)

# Source of each row, unless it says otherwise: the class named, transformers 5.23.0, models/<type>/modeling_<type>.py.
_FAMILIES: Mapping[str, _Family] = {
    "mixtral": _Family("softmax", renormalize=True),  # MixtralTopKRouter
    "qwen2_moe": _SOFTMAX,  # Qwen2MoeTopKRouter
    "qwen3_moe": _SOFTMAX,  # Qwen3MoeTopKRouter
    "qwen3_next": _SOFTMAX,  # Qwen3NextTopKRouter
    # Qwen3_5MoeTopKRouter always divides; vLLM's loader still reads norm_topk_prob, so false there is ambiguous.
    "qwen3_5_moe": _Family("softmax", renormalize=True, fixed={"norm_topk_prob": (None, True)}),
    # DeepseekV2TopkRouter ignores norm_topk_prob, other implementations divide where it is true. All agree on false.
    "deepseek_v2": _Family(
        "softmax",
        renormalize=False,
        scale_key="routed_scaling_factor",
        group_score="max",
        grouped_when=("topk_method", "group_limited_greedy"),
        fixed={
            "norm_topk_prob": (None, False),
            "scoring_func": (None, "softmax"),
            "topk_method": ("greedy", "group_limited_greedy"),
        },
    ),
    "deepseek_v3": _DEEPSEEK_V3,  # DeepseekV3TopkRouter
    "kimi_k2": _DEEPSEEK_V3,  # the same architecture under its own type: transformers loads it as deepseek_v3
    "glm4_moe": _DEEPSEEK_V3,  # Glm4MoeTopkRouter
    # MiniMaxM2TopKRouter always adds the bias; vLLM's minimax_m2.py obeys both keys.
    "minimax_m2": _Family(
        "sigmoid",
        renormalize=True,
        bias_name="e_score_correction_bias",
        fixed={"scoring_func": (None, "sigmoid"), "use_routing_bias": (None, True)},
    ),
    # FusedMoEBlock in vLLM's model_executor/models/step3p5.py, which refuses a router without the bias; with it, the
    # model's remote code (router_bias_func in modeling_step3p5.py, also the epsilon's source) knows only the sigmoid.
    "step3p5": _Family(
        "sigmoid",
        renormalize="norm_expert_weight",
        epsilon=1e-20,
        top_k_key="moe_top_k",
        scale_key="moe_router_scaling_factor",
        bias_name="router_bias",
        fixed={"moe_router_activation": ("sigmoid",), "use_moe_router_bias": (True,)},
    ),
}

# Families and exporter versions name the number of experts differently; one that contradicts the tensors is not obeyed.
_EXPERT_COUNT_KEYS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")


def routing_from_config(config: Mapping[str, object], experts: int) -> Routing | None:
    """How a layer with `experts` routed experts routes, by config.json; None where that cannot be told.

    `config` is the parsed config.json; a nested `text_config` describes the language model and is then the one read,
    and a `model_type` may end in `_text`. `experts` is E, counted from the stored tensors. None: an unknown model type,
    a key that is missing, of the wrong type or out of range, or a setting on which implementations disagree. Raises
    nothing.
    """
    if not isinstance(config, Mapping) or (total := _positive_int(experts)) is None:
        return None
    nested = config.get("text_config")
    section: Mapping[str, object] = nested if isinstance(nested, Mapping) else config
    stated_type = section.get("model_type", config.get("model_type"))
    if not isinstance(stated_type, str):
        return None
    model_type = stated_type.removesuffix("_text")
    family = _FAMILIES.get(model_type)
    if family is None or not all(_is_one_of(section.get(key), allowed) for key, allowed in family.fixed.items()):
        return None
    counts = [section[key] for key in _EXPERT_COUNT_KEYS if section.get(key) is not None]
    if any(_positive_int(count) != total for count in counts):
        return None

    top_k = _positive_int(section.get(family.top_k_key))
    scale = 1.0 if family.scale_key is None else _positive_float(section.get(family.scale_key))
    renormalize = section.get(family.renormalize) if isinstance(family.renormalize, str) else family.renormalize
    groups = _groups(family, section, total)
    if top_k is None or scale is None or not isinstance(renormalize, bool) or groups is None:
        return None
    n_group, topk_group = groups
    # Fewer eligible experts than k would leave the rest of the choice to how topk breaks ties between -inf.
    if top_k > total // n_group * topk_group:
        return None
    return Routing(
        model_type=model_type,
        scoring=family.scoring,
        experts=total,
        top_k=top_k,
        renormalize=renormalize,
        scaling_factor=scale,
        epsilon=family.epsilon,
        n_group=n_group,
        topk_group=topk_group,
        group_score=family.group_score or "top2",
        bias_name=family.bias_name,
    )


def router_tensor_names(routing: Routing, moe_module: str) -> tuple[str, str | None]:
    """Names of the router's weight [E, H] and of its correction bias [E], None where the model has no bias.

    `moe_module` holds the experts: `model.layers.1.mlp`, `model.layers.0.block_sparse_moe`, `model.layers.1.moe`.

    >>> router_tensor_names(Routing("mixtral", "softmax", 8, 2, True), "model.layers.0.block_sparse_moe")
    ('model.layers.0.block_sparse_moe.gate.weight', None)
    """
    bias = None if routing.bias_name is None else f"{moe_module}.{routing.bias_name}"
    return f"{moe_module}.gate.weight", bias


def route(
    routing: Routing, hidden_states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route tokens: topk_weights float32 [M, k] and topk_ids int64 [M, k], most preferred expert first.

    `hidden_states` [M, H], `weight` [E, H] and `bias` [E] are floating point, on one device. All arithmetic is float32:
    models that multiply the router in BF16 differ from it by that rounding. The formula is in the module's docstring,
    its source per family beside `_FAMILIES`. ValueError: shapes that do not fit, or a bias missing or unexpected.
    """
    if hidden_states.dim() != 2 or tuple(weight.shape) != (routing.experts, hidden_states.shape[1]):
        raise ValueError(
            f"router weight {tuple(weight.shape)} does not fit {routing.experts} experts and hidden states "
            f"{tuple(hidden_states.shape)}"
        )
    if (bias is not None) != routing.has_correction_bias:
        raise ValueError(f"{routing.model_type} routes {'with' if bias is None else 'without'} a correction bias")
    if bias is not None and tuple(bias.shape) != (routing.experts,):
        raise ValueError(f"correction bias {tuple(bias.shape)} does not fit {routing.experts} experts")

    logits = F.linear(hidden_states.float(), weight.float())
    scores = logits.softmax(dim=-1) if routing.scoring == "softmax" else logits.sigmoid()
    choice = scores if bias is None else scores + bias.float()
    if routing.n_group > 1:
        choice = _limit_to_groups(routing, choice)
    topk_ids = choice.topk(routing.top_k, dim=-1).indices
    topk_weights = scores.gather(-1, topk_ids)
    if routing.renormalize:
        topk_weights = topk_weights / (topk_weights.sum(dim=-1, keepdim=True) + routing.epsilon)
    return topk_weights * routing.scaling_factor, topk_ids


def uniform_routing(
    tokens: int, experts: int, top_k: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Routing for a model whose own is unknown: topk_weights float32 [tokens, k], topk_ids int64 [tokens, k].

    Each token gets k distinct experts, every set equally likely, with positive weights that sum to 1; both are on the
    generator's device. ValueError where k is not between 1 and `experts`.
    """
    if not 1 <= top_k <= experts:
        raise ValueError(f"cannot choose {top_k} distinct experts of {experts}")
    # The k largest of independent uniform draws are a uniformly random set.
    draws = torch.rand(tokens, experts, generator=generator, device=generator.device)
    topk_ids = draws.topk(top_k, dim=-1).indices
    # Not from 0 up: an expert with next to no weight would hide its own error in the sum.
    weights = 0.5 + torch.rand(tokens, top_k, generator=generator, device=generator.device)
    return weights / weights.sum(dim=-1, keepdim=True), topk_ids


def _limit_to_groups(routing: Routing, choice: torch.Tensor) -> torch.Tensor:
    """`choice` [M, E] with -inf outside the `topk_group` best groups of each token."""
    grouped = choice.view(len(choice), routing.n_group, routing.experts // routing.n_group)
    best = grouped.topk(1 if routing.group_score == "max" else 2, dim=-1).values
    group_scores = best.sum(dim=-1)
    kept = group_scores.topk(routing.topk_group, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
    # -inf and not 0: with a negative bias an eligible expert may score below 0.
    return grouped.masked_fill(dropped.unsqueeze(-1), -math.inf).flatten(-2)


def _groups(family: _Family, section: Mapping[str, object], experts: int) -> tuple[int, int] | None:
    """(n_group, topk_group), (1, 1) for a choice among all experts; None if malformed."""
    if family.group_score is None:
        return 1, 1
    if family.grouped_when is not None and section.get(family.grouped_when[0]) != family.grouped_when[1]:
        return 1, 1
    n_group, topk_group = _positive_int(section.get("n_group")), _positive_int(section.get("topk_group"))
    if n_group is None or topk_group is None or topk_group > n_group or experts % n_group:
        return None
    if family.group_score == "top2" and n_group > 1 and experts // n_group < 2:
        return None
    return n_group, topk_group


def _is_one_of(value: object, allowed: tuple[Setting, ...]) -> bool:
    # By type too: JSON's 1 is not true, though Python finds them equal.
    return any(type(value) is type(setting) and value == setting for setting in allowed)


def _positive_int(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) and value > 0 else None


def _positive_float(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    # Past float32 the weights would be inf or 0; this also keeps huge ints from overflowing float().
    return float(value) if 1e-30 < value < 1e30 else None
