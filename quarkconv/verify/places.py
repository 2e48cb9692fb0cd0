"""To which MoE layer a tensor belongs."""

from __future__ import annotations

from quarkconv.description import Description


def layer_of(description: Description, name: str) -> int | None:
    """Number of the MoE layer whose module a tensor or module lies below; None for any other."""
    for layer in description.moe_layers:
        if name.startswith(f"{layer.moe}.") or name == layer.moe:
            return layer.index
    return None
