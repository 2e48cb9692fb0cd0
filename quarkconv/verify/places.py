"""The MoE layer of a tensor, and the problem of a tensor with wrong bytes."""

from __future__ import annotations

from quarkconv.description.description import Description
from quarkconv.verify.results import Problem


def layer_of(description: Description, name: str) -> int | None:
    """Number of the MoE layer that a tensor or module belongs to, attention and norms included; None for any other."""
    for layer in description.moe_layers:
        decoder_layer = layer.moe.rpartition(".")[0]
        if name.startswith((f"{layer.moe}.", f"{decoder_layer}." if decoder_layer else layer.moe)):
            return layer.index
    return None


def wrong_pieces(description: Description, tensor: str, source: str, reason: str, count: int, pieces: int) -> Problem:
    """The problem of a tensor in which ``count`` of ``pieces`` are wrong, the first from the tensor ``source``."""
    message = f"The bytes from {source} {reason}"
    if count > 1:
        message += f", as do {count} of {pieces} pieces"
    return Problem("bytes", layer_of(description, tensor), tensor, message, count)
