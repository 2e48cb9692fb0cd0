"""The activations between the two products: gate g and up u become one row, or up alone where experts have no gate.

    silu       silu(g) * u; with a limit L: silu(min(g, L)) * clamp(u, -L, L)      (deepseek_v4, glm5_next)
    gelu       gelu(g) * u, with the error function
    gelu_tanh  gelu(g) * u, in the tanh approximation
    swigluoai  g' * sigmoid(alpha * g') * (u' + 1),  g' = min(g, L), u' = clamp(u, -L, L)   (gpt-oss, minimax_m3)
    swiglustep min(silu(g), L) * clamp(u, -L, L)                                             (Step-3.5)
    situ       alpha * tanh(g / alpha) * sigmoid(g) * u; with a limit L: L * tanh(u / L) for u         (kimi_k3)
    relu2      max(u, 0)^2, without a gate: w13 is [E, I, H]                              (nemotron_h)

The names are those of vLLM (0.33, fused_moe/activation.py), whose relu2 without a gate is `relu2_no_mul`; the formulas
are also those of transformers 5.24's modeling files. gpt-oss interleaves gate and up rows in its own checkpoints; here
the halves are separate for every activation. A NaN in either half stays a NaN: the clamps keep it.
"""

import functools
import math
from dataclasses import dataclass

import torch

_DEFAULT_LIMIT = 7.0
_DEFAULT_ALPHA = 1.702


@dataclass(frozen=True, slots=True)
class _Kind:
    """Which parameters an activation takes, and their defaults.

    gated  w13 has gate and up rows
    limit  the default, None for no limit; `takes_limit` where a limit may be given
    alpha  the default; `takes_alpha` where it may be given, without a default where it must
    """

    gated: bool = True
    takes_limit: bool = False
    limit: float | None = None
    takes_alpha: bool = False
    alpha: float | None = None


_KINDS = {
    "silu": _Kind(takes_limit=True),
    "gelu": _Kind(),
    "gelu_tanh": _Kind(),
    "swigluoai": _Kind(takes_limit=True, limit=_DEFAULT_LIMIT, takes_alpha=True, alpha=_DEFAULT_ALPHA),
    "swiglustep": _Kind(takes_limit=True, limit=_DEFAULT_LIMIT),
    "situ": _Kind(takes_limit=True, takes_alpha=True),
    "relu2": _Kind(gated=False),
}
ACTIVATIONS = tuple(_KINDS)


@dataclass(frozen=True, slots=True)
class Activation:
    """An activation with its parameters; those that it does not use are 0."""

    name: str
    limit: float = 0.0
    alpha: float = 0.0

    @property
    def gated(self) -> bool:
        return _KINDS[self.name].gated

    @property
    def variant(self) -> str:
        """The kernel's name for it: a limit that is optional makes another function."""
        optional = _KINDS[self.name].takes_limit and _KINDS[self.name].limit is None
        return f"{self.name}_limited" if optional and self.limit else self.name


@functools.lru_cache(maxsize=64)
def make_activation(name: str, limit: float | None = None, alpha: float | None = None) -> Activation:
    """Check an activation's name and parameters and fill in the defaults (limit 7.0, alpha 1.702).

    Raises ValueError for an unknown name, a parameter that the activation does not take, one that is missing, or one
    that is not a positive finite number.
    """
    if name not in _KINDS:
        raise ValueError(f"activation: expected one of {', '.join(ACTIVATIONS)}, found {name!r}")
    kind = _KINDS[name]
    return Activation(
        name,
        _checked("activation_limit", limit, name, takes=kind.takes_limit, default=kind.limit, required=False),
        _checked("activation_alpha", alpha, name, takes=kind.takes_alpha, default=kind.alpha, required=True),
    )


def _checked(
    label: str, value: float | None, name: str, *, takes: bool, default: float | None, required: bool
) -> float:
    if value is None:
        if takes and default is None and required:
            raise ValueError(f"{label}: expected a number ({name!r} has no default), found None")
        return default or 0.0
    if not takes:
        raise ValueError(f"{label}: expected None ({name!r} has no such parameter), found {value!r}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{label}: expected a positive finite number, found {value!r}")
    return float(value)


def activate_reference(gate: torch.Tensor | None, up: torch.Tensor, activation: Activation) -> torch.Tensor:
    """Torch twin of the activation in the epilogue of the first product; works in the dtype of its inputs.

    `gate` is None where experts have no gate.
    """
    limit, alpha, name = activation.limit, activation.alpha, activation.variant
    if gate is None:
        assert name == "relu2", name
        return up.clamp(min=0).square()
    if name == "silu":
        return torch.nn.functional.silu(gate) * up
    if name in ("gelu", "gelu_tanh"):
        return torch.nn.functional.gelu(gate, approximate="tanh" if name == "gelu_tanh" else "none") * up
    if name in ("situ", "situ_limited"):
        up = up if name == "situ" else limit * torch.tanh(up / limit)
        return alpha * torch.tanh(gate / alpha) * torch.sigmoid(gate) * up
    up = up.clamp(-limit, limit)
    if name == "swiglustep":
        return torch.nn.functional.silu(gate).clamp(max=limit) * up
    gate = gate.clamp(max=limit)
    if name == "silu_limited":
        return torch.nn.functional.silu(gate) * up
    assert name == "swigluoai", name
    return gate * torch.sigmoid(alpha * gate) * (up + 1)
