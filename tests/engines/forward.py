"""The routed experts of an export in float64, from its bytes: what an engine's layer must compute."""

from __future__ import annotations

import torch
from engines.expected import WHOLE, Stacked


def exact_experts(
    stacked: Stacked,
    layer: str,
    x: torch.Tensor,
    weights: torch.Tensor,
    ids: torch.Tensor,
    *,
    static: bool = False,
    int8: bool = True,
    slices: int = 1,
) -> torch.Tensor:
    """The weighted sum over each token's experts, float64 [M, H].

    Args:
        layer: an engine's name of the module of the routed experts.
        x, weights, ids: tokens [M, H], weights [M, K] and ids [M, K] of their experts.
        static: activations have the scales of the export; otherwise each row has its own, absmax / 127.
        int8: activations are rounded to codes, and h to bf16 before, as forwards do; otherwise nothing is rounded.
        slices: in so many parts h is quantized, each with scales of its own, as ranks of tensor parallelism do.
    """

    def tensor(leaf: str) -> torch.Tensor:
        return stacked.parameter(f"{layer}.{leaf}", WHOLE).double()

    def codes(values: torch.Tensor, half: str, expert: int) -> torch.Tensor:
        if not int8:
            return values
        scale = values.abs().amax(-1, keepdim=True).float() / 127
        if static:
            scale = stacked.input_scale(f"{layer}.{half}_input_scale", WHOLE)[expert].expand_as(scale)
        return (values.float() / scale).round().clamp(-127, 127).double() * scale.double()

    w13, w2 = (tensor(f"{half}_weight") * tensor(f"{half}_weight_scale") for half in ("w13", "w2"))
    out = torch.zeros(x.shape, dtype=torch.float64)
    for expert in range(w13.shape[0]):
        token, slot = (ids == expert).nonzero(as_tuple=True)
        gate, up = (codes(x[token].double(), "w13", expert) @ w13[expert].T).chunk(2, 1)
        h = torch.nn.functional.silu(gate) * up
        h = h.bfloat16().double() if int8 else h
        y = torch.cat([codes(part, "w2", expert) for part in h.chunk(slices, 1)], 1) @ w2[expert].T
        out.index_add_(0, token, y * weights[token, slot].double()[:, None])
    return out


def relative_error(out: torch.Tensor, expected: torch.Tensor) -> float:
    """The norm of the difference over that of what is expected."""
    return float((out.double() - expected).norm() / expected.norm())
