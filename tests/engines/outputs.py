"""The routed experts of an export, exactly by :mod:`quarkconv.verify`, beside what an engine's layer computes."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

import torch
from engines.forward import relative_error

import quarkconv
from quarkconv.description.description import describe
from quarkconv.experts.function import ExpertActivation, Routing, Unknown
from quarkconv.experts.knowledge import knowledge, layer_activation, layer_routing
from quarkconv.verify.reference import reference_forwards

TOKENS, TOP_K = 12, 2
LARGEST: Final = 4.0
"""Of gate and up: functions differ there. Where a function has a limit, which is 7 or 10, six times as large."""
BOUND: Final = 0.02
"""Of the error over the norm: engines round gate and up to bf16, so that some codes of h differ by one."""
WRONG: Final = 1.5
"""A function, or weights on the other side of the experts, that are not the model's are this many bounds off."""


class ExactExperts:
    """The first layer of routed experts of an export.

    Attributes:
        activation: the function of the experts.
        on_input: whether weights multiply the tokens.
    """

    def __init__(self, source: Path) -> None:
        description = describe(source)
        layer = description.int8_layers[0]
        known = knowledge(description.config.raw, layer.moe)
        activation, routing = layer_activation(known, layer), layer_routing(known, layer)
        assert not isinstance(activation, Unknown), activation.reason
        self.activation: ExpertActivation = activation
        self.on_input = isinstance(routing, Routing) and routing.on_input
        self._experts = quarkconv.load_fused_experts(source, layer.prefix)

    def inputs(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Tokens bf16 [M, H], and the weights float32 and ids int32 [M, k] of their experts."""
        experts = self._experts
        random = torch.Generator().manual_seed(1)
        x = torch.randn(TOKENS, experts.hidden_size, generator=random)
        products = (experts.w13.float() * experts.w13_scale) @ x.T
        largest = LARGEST * (1 if self.activation.limit is None else 6)
        k = 1 if self.on_input else TOP_K
        ids = torch.stack([torch.randperm(experts.experts, generator=random)[:k] for _ in range(TOKENS)])
        weights = torch.rand(TOKENS, k, generator=random)
        return (x * (largest / products.abs().max())).bfloat16(), weights, ids.int()

    def errors(self, found: torch.Tensor) -> dict[str, Any]:
        """Errors over the norm of an engine's output for the inputs: ``error``, and the least of what is ``other``.

        Other is another activation, and weights on the other side of the experts.
        """
        plain = ExpertActivation("gelu" if self.activation == ExpertActivation("silu") else "silu")
        others = [self._error(found, self.activation, not self.on_input)]
        others += [self._error(found, plain, self.on_input)] if self.activation.gated else []
        error = self._error(found, self.activation, self.on_input)
        return {"activation": self.activation.describe(), "error": error, "other": min(others)}

    def _error(self, found: torch.Tensor, activation: ExpertActivation, on_input: bool) -> float:
        x, weights, ids = self.inputs()
        if on_input and self.on_input:  # engines round the product of token and weight
            x, weights, on_input = x * weights.bfloat16(), torch.ones_like(weights), False
        read = self._experts.projection
        exact = reference_forwards(x, weights, ids.long(), read, activation, on_input=on_input)
        return relative_error(found, exact.exact)


def quantize(states: torch.Tensor, **_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of each row."""
    scale = states.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return torch.round(states.float() / scale).to(torch.int8), scale


def align(
    topk_ids: torch.Tensor, experts: int, block: int, pairs: torch.Tensor, owners: torch.Tensor, padded: torch.Tensor,
    *_: Any,
) -> None:  # fmt: skip
    """Pairs of token and expert sorted by expert, those of each padded to whole blocks with the number of pairs."""
    flat = topk_ids.flatten()
    pairs.fill_(len(flat))
    owners.zero_()
    at = 0
    for expert in range(experts):
        own = (flat == expert).nonzero().flatten()
        pairs[at : at + len(own)] = own.to(pairs.dtype)
        blocks = -(-len(own) // block)
        owners[at // block : at // block + blocks] = expert
        at += blocks * block
    padded.fill_(at)


def situ(gate: torch.Tensor, up: torch.Tensor, beta: float, linear_beta: float) -> torch.Tensor:
    """SiTU, with a linear beta where that is above 0."""
    up = linear_beta * torch.tanh(up / linear_beta) if linear_beta > 0 else up
    return beta * torch.tanh(gate / beta) * torch.sigmoid(gate) * up


def swiglu(gate: torch.Tensor, up: torch.Tensor, limit: float, alpha: float, beta: float) -> torch.Tensor:
    """SwiGLU of clamped values."""
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return gate * torch.sigmoid(alpha * gate) * (up + beta)
