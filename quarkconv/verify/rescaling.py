"""Weights that differ from the unquantized model's by factors per channel, as SmoothQuant and AWQ leave them.

Before they quantize, these methods move size from activations to weights without changing the function of a layer:

    gate'  = gate diag(s)                 the norm before the layer, and the router, absorb s [H]
    up'    = diag(1 / r) up diag(s)       r [I] of each expert
    down'  = down diag(r)

The factors are estimated by least squares, column by column and row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from quarkconv.experts.naming import Role
from quarkconv.load.experts import FusedExperts

CANCEL_BOUND: Final = 0.05
"""Bound on the difference from 1 of an up factor times a down factor, root mean square over the channels. An estimate
from n elements with the noise of 8 bits, 1 % of an element, is off by 1 % / sqrt(n)."""

_Weight = Callable[[Role, int], Tensor]


@dataclass(frozen=True, slots=True)
class Rescaling:
    """The factors of a layer.

    Attributes:
        inputs: s, float64 [H].
        up: 1 / r of each expert, float64 [E, I].
        down: r of each expert, float64 [E, I].
    """

    inputs: Tensor
    up: Tensor
    down: Tensor

    def apply(self, weight: _Weight) -> _Weight:
        """The unquantized weights with the factors, as they were quantized."""

        def rescaled(role: Role, expert: int) -> Tensor:
            values = weight(role, expert)
            if role == "down":
                return values * self.down[expert]
            values = values * self.inputs
            return values * self.up[expert].unsqueeze(1) if role == "up" else values

        return rescaled

    def apply_inputs(self, weight: _Weight) -> _Weight:
        """The unquantized weights for hidden states that were divided by s, as those of the quantized layer are."""

        def rescaled(role: Role, expert: int) -> Tensor:
            return weight(role, expert) if role == "down" else weight(role, expert) * self.inputs

        return rescaled

    @property
    def cancels(self) -> bool:
        """Whether the factors of up and down cancel in every expert, so that the function is the same."""
        difference = self.up * self.down - 1
        return bool((difference.square().mean(dim=1).sqrt() <= CANCEL_BOUND).all())


def estimate_rescaling(experts: FusedExperts, weight: _Weight) -> Rescaling:
    """The factors that bring the unquantized weights closest to the quantized ones."""
    device = experts.w13.device
    over = torch.zeros(experts.hidden_size, dtype=torch.float64, device=device)
    under = torch.zeros_like(over)
    for expert in range(experts.experts):
        gate = weight("gate", expert)
        over += (_quantized(experts, "gate", expert) * gate).sum(dim=0)
        under += gate.square().sum(dim=0)
    inputs = _ratio(over, under)
    up, down = [], []
    for expert in range(experts.experts):
        values = weight("up", expert) * inputs
        up.append(_ratio((_quantized(experts, "up", expert) * values).sum(dim=1), values.square().sum(dim=1)))
        values = weight("down", expert)
        down.append(_ratio((_quantized(experts, "down", expert) * values).sum(dim=0), values.square().sum(dim=0)))
    return Rescaling(inputs, torch.stack(up), torch.stack(down))


def _quantized(experts: FusedExperts, role: Role, expert: int) -> Tensor:
    projection = experts.projection(role, expert)
    return projection.dequantized(torch.float64, projection.codes.device)


def _ratio(over: Tensor, under: Tensor) -> Tensor:
    """Their quotient; 1 where a channel is zero."""
    return torch.where(under > 0, over / under.clamp(min=torch.finfo(torch.float64).tiny), torch.ones_like(over))
