"""Launch of the warp-specialized grouped products; see `jit.specialized`."""

from typing import Any

from ..arguments import GroupedProduct
from ..backend import dependence, device_traits
from ..tables import GROUP_WARPS, HALF, RowBlocks, TileOptions
from .descriptors import describe
from .prepared import launch

_MOST_ROWS = 32  # of a tile that the epilogue takes at a time
_REGISTERS = 168  # a thread of twelve warps, of the 65536 of an SM


def launch_specialized(product: GroupedProduct, options: TileOptions) -> None:
    """A product on codes in the plan's row order; codes and weights must be what descriptors can be made of."""
    from ..jit.specialized import specialized_product_kernel

    codes, weights, plan, out = product.codes, product.weights, product.plan, product.out
    blocks, processors = plan.blocks, device_traits(out.device).processors
    tiles = plan.max_blocks * -(-product.columns // (HALF * options.sharing * (1 if product.gated else 2)))
    # 32-bit results, used by tests only, need more shared memory for the store.
    stages = options.num_stages - (out.element_size() == 4)
    launch(
        specialized_product_kernel,
        (min(processors, tiles),),
        describe(codes, blocks.block_m, options.block_k, swizzled=True),
        describe(codes, blocks.tail_m, options.block_k, swizzled=True) if blocks.tail_m else None,
        product.row_scale,
        describe(weights.codes, HALF * options.sharing, options.block_k, swizzled=True),
        weights.scale,
        weights.bias,
        product.router_weight,
        out,
        *plan.for_products(),
        product.depth,
        product.columns,
        *product.limits,
        **product.constants,
        **specialized_constants(options, blocks, stages),
        **dependence(out.device),
    )


def specialized_constants(options: TileOptions, blocks: RowBlocks, stages: int) -> dict[str, Any]:
    """The constants of the kernel that follow from its tile and row blocks."""
    return {
        "PARTS": options.sharing,
        "BLOCK_D": options.block_k,
        "PIECE": rows_at_a_time(blocks),
        "GROUP_M": options.group_m,
        "STAGES": stages,
        "num_warps": GROUP_WARPS,
        "maxnreg": _REGISTERS,
    }


def rows_at_a_time(blocks: RowBlocks) -> int:
    """Rows of a tile that are scaled, activated and stored together: a part of each height that a tile can have."""
    return min([_MOST_ROWS, *(rows for rows in (blocks.block_m, blocks.tail_m, blocks.small_m) if rows)])
