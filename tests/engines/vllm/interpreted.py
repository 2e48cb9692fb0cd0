"""vLLM's Triton kernel in Triton's interpreter, called through :class:`VLLMKernel`: prints the errors of both products.

A program of its own: vLLM and Triton look at the environment when they are imported. What vLLM compiles beside its
kernel (quantization of tokens, activation, sum over experts) is computed with torch.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.update(CUDA_VISIBLE_DEVICES="", TRITON_INTERPRET="1")  # empty: vLLM then allows for no GPU
sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import engines.vllm.loading  # noqa: F401  prepares vLLM for a machine without GPU
import torch
from torch.nn.functional import silu
from vllm import _custom_ops
from vllm.model_executor.layers.fused_moe import fused_moe, utils

from quarkconv.kernels.tune import make_weights
from quarkconv.tune.grid import Tile
from quarkconv.tune.kernels import Routed, VLLMKernel
from quarkconv.tune.shapes import whole

TOKENS, SHAPE = 4, whole(32, 2, 128, 64)  # so few that vLLM sorts no pairs, which is compiled


def quantize(states: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of each row."""
    scale = states.float().abs().amax(-1, keepdim=True).clamp(min=1e-10) / 127
    return torch.round(states.float() / scale).to(torch.int8), scale


def activate(out: torch.Tensor, gate_up: torch.Tensor) -> None:
    """silu(gate) * up, in float32, rounded once."""
    gate, up = gate_up.float().chunk(2, -1)
    out.copy_(silu(gate) * up)


def product(
    codes: torch.Tensor, row_scale: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor
) -> torch.Tensor:
    """Rows of codes times the weight of an expert each, in float64."""
    rows = [weight[expert].double() @ row.double() for row, expert in zip(codes, ids.flatten(), strict=True)]
    return torch.stack(rows) * row_scale.double() * scale[ids.flatten(), :, 0].double()


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    """||found - expected|| / ||expected||"""
    return float((found.double() - expected).norm() / expected.norm())


def main() -> None:
    """Print a line for each of two tiles: the errors of gate-up and of down, each with its own input."""
    seen: dict[str, torch.Tensor] = {}

    def seen_activation(activation: object, out: torch.Tensor, gate_up: torch.Tensor) -> None:  # noqa: ARG001
        activate(out, gate_up)
        seen.update(gate_up=gate_up.clone(), hidden=out.clone())

    def seen_sum(values: torch.Tensor, out: torch.Tensor) -> None:
        seen.update(values=values.clone())
        out.copy_(values.float().sum(1))

    utils.per_token_quant_int8, fused_moe.apply_moe_activation, _custom_ops.moe_sum = (
        quantize,
        seen_activation,
        seen_sum,
    )
    torch.manual_seed(0)
    weights = w13, w2, w13_scale, w2_scale = make_weights(SHAPE.sizes, torch.device("cpu"))
    scores, ids = torch.softmax(torch.randn(TOKENS, SHAPE.experts), -1).topk(SHAPE.top_k, -1)
    states = torch.randn(TOKENS, SHAPE.hidden).bfloat16()
    kernel = VLLMKernel()
    [forward] = kernel.forwards(SHAPE, weights, [Routed(states, scores.contiguous(), ids.int().contiguous())])
    codes, row_scale = (part.repeat_interleave(SHAPE.top_k, 0) for part in quantize(states))
    for tile in (Tile(16, 64, 64, 1, 4, 3), Tile(32, 128, 128, 4, 8, 2)):
        with kernel.using(tile):
            out = forward()
        assert isinstance(out, torch.Tensor)
        gate_up = product(codes, row_scale, w13, w13_scale, ids)
        down = product(*quantize(seen["hidden"]), w2, w2_scale, ids) * scores.reshape(-1, 1)
        print(error(seen["gate_up"], gate_up), error(seen["values"].view(down.shape), down))
    same = [tensor[:1].expand(SHAPE.experts, -1, -1) for tensor in weights]
    routed = Routed(states, scores.contiguous(), ids.int().contiguous())
    outs: list[torch.Tensor] = []
    for w13, w2, w13_scale, w2_scale in (same, [tensor.contiguous() for tensor in same]):
        out = kernel.forwards(SHAPE, (w13, w2, w13_scale, w2_scale), [routed])[0]()
        assert isinstance(out, torch.Tensor)
        outs.append(out.clone())
    assert torch.equal(outs[0], outs[1]), "experts that are one in memory"


if __name__ == "__main__":
    main()
