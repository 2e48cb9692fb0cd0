"""To which MoE layer a tensor belongs."""

from __future__ import annotations

from quarkconv.description import Description


def layer_of(description: Description, name: str) -> int | None:
    """Number of the MoE layer that a tensor or module belongs to, attention and norms included; None for any other."""
    for layer in description.moe_layers:
        decoder_layer = layer.moe.rpartition(".")[0]
        if name.startswith((f"{layer.moe}.", f"{decoder_layer}." if decoder_layer else layer.moe)):
            return layer.index
    return None
