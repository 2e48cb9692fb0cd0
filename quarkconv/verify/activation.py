"""The activation function of a model's experts, from its config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quarkconv.experts.config import model_config

_NAMES: Final = {
    "silu": "silu", "swish": "silu",
    "gelu_tanh": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh",
}  # fmt: skip
"""``hidden_act`` of a config -> name of the gated activation."""


@dataclass(frozen=True, slots=True)
class ExpertActivation:
    """A gated activation: its name as :func:`quarkconv.kernels.fused_experts_int8` takes it, and its clamp."""

    name: str
    limit: float | None = None

    def describe(self) -> str:
        """For people."""
        return self.name if self.limit is None else f"{self.name}, clamped at {self.limit:g}"


def expert_activation(config: Mapping[str, Any], layer: int) -> ExpertActivation | None:
    """The activation of the experts of a layer; None when the config names one that is not known.

    Args:
        config: config.json.
        layer: number of the layer. Step-3.5 clamps in some layers: ``swiglu_limits`` has an entry for each, 0 or null
            for no clamp (vLLM, ``model_executor/models/step3p5.py``).
    """
    name = _NAMES.get(model_config(config).activation or "silu")
    if name is None:
        return None
    limits = model_config(config).text.get("swiglu_limits")
    if isinstance(limits, list) and layer < len(limits):
        limit = limits[layer]
        if isinstance(limit, int | float) and not isinstance(limit, bool) and limit > 0:
            return ExpertActivation("swiglustep", float(limit)) if name == "silu" else None
    return ExpertActivation(name)
