"""The two products for so few pairs that two seldom share an expert: each reads its weights for itself.

The arithmetic is that of `launch.grouped_gemm` and `launch.combine`, bit for bit, on rows in the order of pairs; the
second product includes the reduction over a token's experts. `jit.grouped_gemv` says what makes it faster.
"""

from typing import Any

import torch

from ..activations import Activation
from ..arguments import ExpertWeights
from ..backend import dependence, device_traits, interpreting
from ..options import next_power_of_2
from ..tables import VectorTile
from .prepared import launch

_MAX_BLOCK_D = 128  # int32 of a row that one warp loads at once, 16 bytes a thread


def can_pack(weights: ExpertWeights) -> bool:
    """Whether four codes of a row can be read as one int32."""
    codes = weights.codes
    return codes.shape[2] % 4 == 0 and codes.data_ptr() % 4 == 0 and codes.storage_offset() % 4 == 0


def grouped_gate_up_gemv(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weights: ExpertWeights,
    topk_ids: torch.Tensor,
    activation: Activation,
    out: torch.Tensor,
    tile: VectorTile,
    *,
    router_weight: torch.Tensor | None = None,
    pairs_per_row: int,
) -> torch.Tensor:
    """Launch the gate-up product: codes int8 [R, H], row_scale float32 [R] -> out [P, I], in the order of topk_ids.

    Row p // pairs_per_row of the codes serves pair p. `router_weight` (float32, P elements), where given, multiplies
    row_scale. Rows of pairs without an expert here are not written.
    """
    from ..jit.grouped_gemv import grouped_gate_up_gemv_kernel

    experts, rows, depth = weights.codes.shape
    columns = rows // 2 if activation.gated else rows
    launch(
        grouped_gate_up_gemv_kernel,
        (-(-columns // tile.block_n), topk_ids.numel()),
        codes.view(torch.int32),
        row_scale,
        weights.codes.view(torch.int32),
        weights.scale,
        weights.bias,
        router_weight,
        out,
        topk_ids,
        experts,
        depth // 4,
        columns,
        activation.limit,
        activation.alpha,
        PAIRS_PER_ROW=pairs_per_row,
        ACTIVATION=activation.variant,
        GATED=activation.gated,
        **_constants(weights, tile),
    )
    return out


def combined_down_gemv(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weights: ExpertWeights,
    topk_weights: torch.Tensor | None,
    topk_ids: torch.Tensor,
    out: torch.Tensor,
    tile: VectorTile,
) -> torch.Tensor:
    """Launch the down product and the sum over experts: codes int8 [P, I], row_scale float32 [P] -> out [M, H].

    y is rounded to the dtype of `out` before the sum. `topk_weights` (float32 [M, K], None: all 1) multiply it.
    """
    from ..jit.grouped_gemv import combined_down_gemv_kernel

    experts, hidden, depth = weights.codes.shape
    tokens, top_k = topk_ids.shape
    launch(
        combined_down_gemv_kernel,
        (-(-hidden // tile.block_n), tokens),
        codes.view(torch.int32),
        row_scale,
        weights.codes.view(torch.int32),
        weights.scale,
        weights.bias,
        topk_weights,
        out,
        topk_ids,
        experts,
        depth // 4,
        hidden,
        TOP_K=top_k,
        SLOTS=next_power_of_2(top_k),
        **_constants(weights, tile),
    )
    return out


def chunks_of(depth: int) -> tuple[int, int]:
    """(int32 a chunk, chunks) of a row of `depth` codes: the largest power of two that leaves few lanes idle."""
    width = depth // 4
    block = _MAX_BLOCK_D
    while block > 32 and width % block:
        block //= 2
    return block, -(-width // block)


def _constants(weights: ExpertWeights, tile: VectorTile) -> dict[str, Any]:
    depth, device = weights.codes.shape[2], weights.codes.device
    block, chunks = chunks_of(depth)
    return {
        "PER_CHANNEL": weights.per_channel,
        "INTERPRETED": interpreting(),
        "DOT4": device_traits(device).dot4,
        "EVEN_D": depth % (4 * block) == 0,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block,
        "CHUNKS": chunks,
        "num_warps": tile.num_warps,
    } | dependence(device)
