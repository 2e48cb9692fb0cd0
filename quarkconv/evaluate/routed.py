"""What the routed experts of a layer are called with, and the errors of single experts on it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor, nn

from quarkconv.evaluate.expert_classes import run_one_each
from quarkconv.evaluate.int8 import Int8Experts
from quarkconv.evaluate.sums import DeviceSums, squares

SAMPLE_TOKENS: Final = 1024
"""Tokens of which each expert's error is computed."""


@dataclass(slots=True)
class Routed:
    """Routed experts of a layer, and what they were called with: hidden states [M, H], ids and weights [M, k]."""

    experts: nn.Module
    states: Tensor
    ids: Tensor
    weights: Tensor


def sample_experts(modules: Mapping[str, nn.Module], routed: Routed, sums: DeviceSums) -> None:
    """Add the errors of single experts on the first tokens that the baseline routed."""
    int8 = next((module for module in modules.values() if isinstance(module, Int8Experts)), None)
    if int8 is None:
        return
    hidden, ids, weights = (part[:SAMPLE_TOKENS] for part in (routed.states, routed.ids, routed.weights))
    pairs = hidden.repeat_interleave(ids.shape[1], dim=0)
    flat_ids, flat_weights = ids.reshape(-1, 1), weights.reshape(-1, 1)
    with torch.no_grad():
        expected = run_one_each(routed.experts, pairs, flat_ids, flat_weights).double().reshape(pairs.shape)
        computed = int8(pairs, flat_ids, flat_weights).double()
    errors = (computed - expected).square().sum(-1)
    experts = int8.experts.experts
    chosen = torch.arange(experts, device=errors.device).unsqueeze(1) == flat_ids.flatten()
    sums.add(
        expert_errors=chosen.double() @ errors,  # index_add sums in any order on a GPU
        expert_tokens=counts(flat_ids, experts),
        expert_norm=squares(expected.reshape(*ids.shape, -1).sum(1)),
    )


def counts(ids: Tensor, experts: int) -> Tensor:
    """How often each expert is chosen, int64 [E]; identities, whose ids are E and more, are not counted."""
    flat = ids.flatten().long()
    found = torch.zeros(experts + 1, dtype=torch.int64, device=ids.device)
    return found.scatter_add_(0, flat.clamp(max=experts), torch.ones_like(flat))[:experts]
