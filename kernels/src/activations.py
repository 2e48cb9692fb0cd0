"""The gated activations: how the gate and up halves of the first product become one row.

    silu       silu(g) * u
    gelu_tanh  gelu(g) * u, in the tanh approximation
    swigluoai  g' * sigmoid(alpha * g') * (u' + 1),  g' = min(g, limit), u' = clamp(u, -limit, limit)   (gpt-oss)
    swiglustep min(silu(g), limit) * clamp(u, -limit, limit)                                         (Step-3.5)

The names are those of vLLM. gpt-oss interleaves gate and up rows in its own checkpoints; here the halves are
separate for every activation. A NaN in either half stays a NaN: the clamps do not swallow it.
"""

import math
from dataclasses import dataclass

import torch

_DEFAULT_LIMIT = 7.0
_DEFAULT_ALPHA = 1.702
_CLAMPED = ("swigluoai", "swiglustep")

ACTIVATIONS = ("silu", "gelu_tanh", *_CLAMPED)


@dataclass(frozen=True, slots=True)
class Activation:
    """A gated activation with its parameters; those that `name` does not use are 0."""

    name: str
    limit: float = 0.0
    alpha: float = 0.0


def make_activation(name: str, limit: float | None = None, alpha: float | None = None) -> Activation:
    """Check an activation's name and parameters and fill in the defaults (limit 7.0, alpha 1.702).

    Raises ValueError for an unknown name, a parameter that the activation does not take, or one that is not a
    positive finite number.
    """
    if name not in ACTIVATIONS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {name!r}")
    takes_limit = name in _CLAMPED
    takes_alpha = name == "swigluoai"
    for label, value, taken in (("activation_limit", limit, takes_limit), ("activation_alpha", alpha, takes_alpha)):
        if value is None:
            continue
        if not taken:
            raise ValueError(f"{label}: expected None, since {name!r} takes none, found {value!r}")
        if not (math.isfinite(value) and value > 0):
            raise ValueError(f"{label}: expected a positive finite number, found {value!r}")
    return Activation(
        name,
        limit=(_DEFAULT_LIMIT if limit is None else float(limit)) if takes_limit else 0.0,
        alpha=(_DEFAULT_ALPHA if alpha is None else float(alpha)) if takes_alpha else 0.0,
    )


def activate_reference(gate: torch.Tensor, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Torch twin of the activation in the gate-up kernel's epilogue; works in the dtype of its inputs."""
    limit = activation.limit
    if activation.name == "silu":
        return torch.nn.functional.silu(gate) * up
    if activation.name == "gelu_tanh":
        return torch.nn.functional.gelu(gate, approximate="tanh") * up
    up = up.clamp(-limit, limit)
    if activation.name == "swiglustep":
        return torch.nn.functional.silu(gate).clamp(max=limit) * up
    gate = gate.clamp(max=limit)
    return gate * torch.sigmoid(activation.alpha * gate) * (up + 1)
