"""The activation function of an expert in the arithmetic of the references, and the error of it in float32."""

from __future__ import annotations

from typing import Final

import torch
import torch.nn.functional as F
from torch import Tensor

from quarkconv.experts.function import ExpertActivation

FLOAT32_STEP: Final = 2.0**-24
"""Largest relative error of one rounding to float32."""


def activate(gate: Tensor | None, up: Tensor, activation: ExpertActivation) -> Tensor:
    """The activation function, in the dtype of its arguments: see :class:`ExpertActivation`.

    ``gate`` is None for experts without a gate.
    """
    name, limit = activation.name, activation.limit
    if gate is None:
        return up.clamp(min=0).square()
    if name == "situ":
        assert activation.beta is not None
        if activation.linear_beta is not None:
            up = activation.linear_beta * torch.tanh(up / activation.linear_beta)
        return activation.beta * torch.tanh(gate / activation.beta) * torch.sigmoid(gate) * up
    if name in ("gelu", "gelu_tanh"):
        return F.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none") * up
    if limit is not None:
        up = up.clamp(-limit, limit)
        if name != "swiglustep":
            gate = gate.clamp(max=limit)
    if name == "swigluoai":
        assert activation.alpha is not None
        return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
    gated = gate * torch.sigmoid(gate)
    if name == "swiglustep" and limit is not None:
        gated = gated.clamp(max=limit)
    return gated * up


def float32_error(gate: Tensor | None, up: Tensor, hidden: Tensor, activation: ExpertActivation) -> Tensor:
    """How far an activation in float32 may be from the exact one.

    Sixteen roundings at most; an exponential whose argument is off by a rounding of g; and, where the function
    subtracts (1 + tanh of gelu, u + 1 of swigluoai), errors of the size of the products.
    """
    size = torch.zeros_like(up) if gate is None else gate.abs()
    error = hidden.abs() * (16 + 2 * size) * FLOAT32_STEP
    if activation.name in ("silu", "swiglustep", "relu2"):
        return error
    return error + 4 * FLOAT32_STEP * size * up.abs()
