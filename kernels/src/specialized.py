"""Launch of the grouped products whose warps have different things to do; see `specialized_jit`."""

from typing import Any

import torch

from .backend import dependence, device_traits
from .grouped_gemm import ExpertWeights
from .routing import RoutingPlan
from .tables import GROUP_WARPS, RowBlocks, TileOptions

HALF = 64  # as in `specialized_finish_jit`
MOST_ROWS = 32  # of a tile that are finished at a time
REGISTERS = 168  # a thread of twelve warps, of the 65536 that a processor has


def launch_specialized(
    codes: torch.Tensor,
    row_scale: torch.Tensor,
    weights: ExpertWeights,
    router_weight: torch.Tensor | None,
    out: torch.Tensor,
    plan: RoutingPlan,
    options: TileOptions,
    columns: int,
    limits: tuple[float, float],
    activation: str,
    *,
    gated: bool,
) -> None:
    """A product of `grouped_gemm` on codes int8 [P, D] and row_scale float32 [P] in the plan's row order.

    `columns` of the result: I of gate-up, H of down. Codes and weights must be what descriptors can be made of.
    """
    from .specialized_jit import specialized_product_kernel

    blocks, depth, traits = plan.blocks, weights.codes.shape[2], device_traits(out.device)
    # Results of 32 bits, which only tests ask for, take more room on their way out.
    stages = options.num_stages - (out.element_size() == 4)
    specialized_product_kernel[(min(traits.processors, plan.max_blocks * -(-columns // options.block_n)),)](
        _descriptor(codes, blocks.block_m, options.block_k),
        _descriptor(codes, blocks.tail_m, options.block_k) if blocks.tail_m else None,
        row_scale,
        _descriptor(weights.codes, HALF * options.sharing, options.block_k),
        weights.scale,
        weights.bias,
        router_weight,
        out,
        plan.pairs,
        plan.block_expert,
        plan.block_first,
        plan.block_rows,
        plan.totals,
        depth,
        columns,
        *limits,
        ACTIVATION=activation,
        PER_CHANNEL=weights.per_channel,
        RAW_SUMS=out.dtype == torch.int32,
        GATED=gated,
        PARTS=options.sharing,
        BLOCK_M=blocks.block_m,
        TAIL_M=blocks.tail_m,
        SMALL_M=blocks.small_m,
        BLOCK_D=options.block_k,
        PIECE=rows_at_a_time(blocks),
        GROUP_M=options.group_m,
        STAGES=stages,
        num_warps=GROUP_WARPS,
        maxnreg=REGISTERS,
        **dependence(out.device),
    )


def rows_at_a_time(blocks: RowBlocks) -> int:
    """Rows of a tile that are scaled, activated and stored together: a part of each height that a tile can have."""
    return min([MOST_ROWS, *(rows for rows in (blocks.block_m, blocks.tail_m, blocks.small_m) if rows)])


def _descriptor(codes: torch.Tensor, rows: int, block_k: int) -> Any:
    """A descriptor of `codes` as [-1, D] for tiles of `rows` rows, laid out as matrix instructions read them."""
    from triton.experimental.gluon.language import NVMMASharedLayout
    from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

    layout = NVMMASharedLayout(swizzle_byte_width=block_k, element_bitwidth=8, rank=2)
    return TensorDescriptor.from_tensor(codes.view(-1, codes.shape[-1]), [rows, block_k], layout)
