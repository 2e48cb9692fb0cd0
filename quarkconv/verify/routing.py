"""The model's own expert routing, from config.json and the router's stored tensors alone.

Shapes: M tokens, H hidden size, E routed experts, Z experts without weights, k experts per token, G groups of E / G.

    logits  = hidden_states @ weight.T                 [M, E + Z], in float32
    scores  = softmax(logits) or sigmoid(logits)       [M, E + Z]
    choice  = scores + bias                            [M, E + Z]; -inf outside the best `topk_group` of G groups
    ids     = the k largest of choice                  [M, k]
    weights = scores[ids], over their sum, times the scaling factor: the bias affects the choice, not the weights

Layers that choose by token id have the ids from a table [vocabulary, k] instead. The additions of families are in
:class:`quarkconv.experts.function.Routing`; each family is a row of :mod:`quarkconv.experts.families`. Where two
implementations of a family disagree about a setting, that setting is refused rather than guessed.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F

from quarkconv.experts.function import Routing, Unknown
from quarkconv.experts.knowledge import knowledge


class RouterExtras(NamedTuple):
    """Tensors that few routers have: biases of the logits [E], scales of the input [H] and of the weights [E]."""

    logit_bias: torch.Tensor | None = None
    input_scale: torch.Tensor | None = None
    expert_scale: torch.Tensor | None = None


def routing_of(config: object, experts: int, layer: int | None = None, module: str = "") -> Routing | Unknown:
    """The routing of a layer with `experts` routed experts, by config.json; or why it is unknown.

    `config` is the parsed config.json. `experts` is E, counted from the stored tensors, `layer` the layer's number for
    models whose layers differ, `module` its name for models of several stacks of layers. Raises nothing.
    """
    if isinstance(experts, bool) or not isinstance(experts, int) or experts <= 0:
        return Unknown("the layer has no experts")
    known = knowledge(config, module)
    return known if isinstance(known, Unknown) else known.routing(experts, layer)


def route(
    routing: Routing,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    extras: RouterExtras = RouterExtras(),  # noqa: B008 - a tuple of None
    *,
    chosen: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Route tokens: topk_weights float32 [M, k] and topk_ids int64 [M, k], most preferred expert first.

    `hidden_states` [M, H], `weight` [E + Z, H] and `bias` [E + Z] are floating point, on one device. All arithmetic is
    float32: models that multiply the router in BF16 differ from it by that rounding. The formula is in the module's
    docstring, its source per family in the table. `chosen` int64 [M, k] are the experts where the token ids decide. An
    id of -1 is one of the Z experts without weights, whose output is its input. ValueError: shapes that do not fit, or
    a tensor missing or unexpected.
    """
    total = routing.experts + routing.zero_experts
    if (chosen is not None) != routing.by_token_id:
        raise ValueError(f"{routing.model_type} routes {'by' if chosen is None else 'without'} token ids here")
    _check(routing, hidden_states, weight, bias, extras, total)
    logits = F.linear(_router_input(routing, hidden_states, extras), weight.float(), _float(extras.logit_bias))
    if routing.softcap is not None:
        logits = routing.softcap * torch.tanh(logits / routing.softcap)
    if routing.scoring == "sparsemixer":
        topk_weights, topk_ids = _sparsemixer(logits, routing.jitter)
    elif routing.by_logits:
        values, topk_ids = logits.topk(routing.top_k, dim=-1)
        topk_weights = _scores(routing, values)
    else:
        scores = _scores(routing, logits)
        choice = scores if bias is None else scores + bias.float().reshape(total)
        if routing.n_group > 1:
            choice = _limit_to_groups(routing, choice)
        topk_ids = choice.topk(routing.top_k, dim=-1).indices if chosen is None else chosen
        topk_weights = scores.gather(-1, topk_ids)
    if routing.renormalize:
        topk_weights = topk_weights / _divisor(routing, topk_weights)
    topk_weights = topk_weights * routing.scaling_factor
    if extras.expert_scale is not None:
        topk_weights = topk_weights * extras.expert_scale.float()[topk_ids]
    if routing.zero_experts:
        topk_ids = topk_ids.masked_fill(topk_ids >= routing.experts, -1)
    return topk_weights, topk_ids


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


def _check(
    routing: Routing,
    hidden_states: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    extras: RouterExtras,
    total: int,
) -> None:
    """Refuse tensors that do not fit."""
    if hidden_states.dim() != 2 or tuple(weight.shape) != (total, hidden_states.shape[1]):
        raise ValueError(
            f"router weight {tuple(weight.shape)} does not fit {total} experts and hidden states "
            f"{tuple(hidden_states.shape)}"
        )
    if (bias is not None) != routing.has_correction_bias:
        raise ValueError(f"{routing.model_type} routes {'with' if bias is None else 'without'} a correction bias")
    if bias is not None and bias.numel() != total:
        raise ValueError(f"correction bias {tuple(bias.shape)} does not fit {total} experts")
    tensors = routing.tensors
    for name, tensor, expected, size in (
        ("logit_bias", extras.logit_bias, tensors.logit_bias, total),
        ("input_scale", extras.input_scale, tensors.input_scale, hidden_states.shape[1]),
        ("expert_scale", extras.expert_scale, tensors.expert_scale, total),
    ):
        if (tensor is not None) != bool(expected):
            raise ValueError(f"{routing.model_type} routes {'with' if tensor is None else 'without'} a {name}")
        if tensor is not None and tuple(tensor.shape) != (size,):
            raise ValueError(f"{name} {tuple(tensor.shape)} does not fit, expected ({size},)")


def _router_input(routing: Routing, hidden_states: torch.Tensor, extras: RouterExtras) -> torch.Tensor:
    """The input of the router: the hidden states, or these normalized and scaled, over sqrt(H)."""
    states = hidden_states.float()
    if routing.input_norm is None or extras.input_scale is None:
        return states
    mean = states.square().mean(dim=-1, keepdim=True) + routing.input_norm
    return states * mean.rsqrt() * extras.input_scale.float() * float(states.shape[-1] ** -0.5)


def _scores(routing: Routing, logits: torch.Tensor) -> torch.Tensor:
    if routing.scoring == "softmax":
        return logits.softmax(dim=-1)
    return logits.sigmoid() if routing.scoring == "sigmoid" else F.softplus(logits).sqrt()


def _divisor(routing: Routing, topk_weights: torch.Tensor) -> torch.Tensor:
    """The norm of the chosen scores [M, 1]: they are positive, so that of order 1 is their sum."""
    total = topk_weights.sum(dim=-1, keepdim=True)
    if routing.norm_order != 1.0:
        total = topk_weights.pow(routing.norm_order).sum(dim=-1, keepdim=True).pow(1 / routing.norm_order)
    total = total + routing.epsilon
    return total.clamp(min=routing.floor) if routing.floor else total


def _sparsemixer(logits: torch.Tensor, jitter: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Two experts in sequence: the best, weighed by a softmax over the logits near it; then the same without.

    Near is a distance of at most twice `jitter`, relative to the larger of the logit's magnitude and the best logit.
    """
    remaining, weights, ids = logits, [], []
    for _ in range(2):
        best, index = remaining.max(dim=-1, keepdim=True)
        far = (best - logits) / logits.abs().clamp(min=best) > 2 * jitter
        weights.append(remaining.masked_fill(far, -math.inf).softmax(dim=-1).gather(-1, index))
        ids.append(index)
        remaining = remaining.scatter(-1, index, -math.inf)
    return torch.cat(weights, dim=-1), torch.cat(ids, dim=-1)


def _limit_to_groups(routing: Routing, choice: torch.Tensor) -> torch.Tensor:
    """`choice` [M, E] with -inf outside the `topk_group` best groups of each token."""
    grouped = choice.view(len(choice), routing.n_group, routing.experts // routing.n_group)
    best = grouped.topk(1 if routing.group_score == "max" else 2, dim=-1).values
    group_scores = best.sum(dim=-1)
    kept = group_scores.topk(routing.topk_group, dim=-1).indices
    dropped = torch.ones_like(group_scores, dtype=torch.bool).scatter(-1, kept, False)
    # -inf and not 0: with a negative bias an eligible expert may score below 0.
    return grouped.masked_fill(dropped.unsqueeze(-1), -math.inf).flatten(-2)


def _float(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.float()
