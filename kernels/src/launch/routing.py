"""Routing: sorts the (token, slot) pairs by expert and cuts every expert's rows into row blocks.

The rows of a program of a grouped product share one expert. The pairs of expert 0 come first, in ascending order,
then those of expert 1, and so on, without gaps; a pair's place in that order is its row. An expert's rows are cut into
blocks of BM rows; what remains joins its last block if it is at most TM rows, or becomes a block of its own:

    c rows -> ceil(c / BM) blocks, or one less where c >= BM and c mod BM is 1..TM.

How many blocks that makes is known only on the device, so the buffers have the size of the worst case,

    max over routings of sum ceil(c_e / BM) = n + floor((P - n) / BM),    n = min(E, P),

and programs beyond the actual count return at once. Pairs whose id is outside 0..E-1 (-1: the expert is on another
rank) are left out.
"""

import torch

from ..arguments import RoutingPlan
from ..backend import dependence
from ..options import next_power_of_2
from ..tables import RowBlocks
from .prepared import Buffer, allocate, launch
from .quantize import quantize_rows, row_constants

_AT_ONCE = 1024  # as many pairs are routed in one launch
_RUN = 512  # of more pairs, a program counts and sorts as many,
_MANY = 256 * _RUN  # and of more than so many,
_LONG_RUN = 2048  # as many, since each program looks at the counts of all
_COUNTS = 8192  # counts that a program looks at at a time


def max_row_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Most row blocks that any routing of `num_pairs` pairs over `num_experts` experts can need."""
    active = min(num_experts, num_pairs)
    return active + (num_pairs - active) // block_m


def empty_plan(num_pairs: int, num_experts: int, blocks: RowBlocks, device: torch.device) -> RoutingPlan:
    """Uninitialized buffers for `route_pairs`."""
    return RoutingPlan(blocks, *allocate(plan_buffers(num_pairs, num_experts, blocks), device))


def plan_buffers(num_pairs: int, num_experts: int, blocks: RowBlocks) -> list[Buffer]:
    """(shape, dtype) of the buffers of a plan, in the order of its fields."""
    most = max_row_blocks(num_pairs, num_experts, blocks.block_m)
    runs = 0 if num_pairs <= _AT_ONCE else -(-num_pairs // _run_length(num_pairs))
    shapes = ((num_pairs,), (num_pairs,), (most,), (most,), (most,), (3,), (runs, num_experts))
    return [(shape, torch.int32) for shape in shapes]


def route_pairs(topk_ids: torch.Tensor, num_experts: int, plan: RoutingPlan) -> RoutingPlan:
    """Launch the routing of topk_ids (int32 or int64, P >= 1 elements) into the buffers of `plan`.

    There are no atomics, so the order is always the same. Few pairs take one launch, in which every expert's program
    looks at all of them. Many are cut into runs: one launch counts each run, and the other sorts each run, places its
    pairs by the counts of all runs, and writes the blocks.
    """
    from ..jit.routing import count_run_kernel, place_runs_kernel, route_at_once_kernel

    num_pairs, device = topk_ids.numel(), topk_ids.device
    dependent, cut = dependence(device), _cut(num_experts, plan)
    block_e = cut["BLOCK_E"]
    blocks = (plan.block_expert, plan.block_first, plan.block_rows, plan.totals)
    if num_pairs <= _AT_ONCE:
        scan = _scan(num_pairs)
        launch(
            route_at_once_kernel,
            (num_experts,),
            topk_ids,
            plan.pairs,
            plan.rows,
            *blocks,
            num_pairs,
            num_experts,
            **cut,
            BLOCK_P=scan,
            num_warps=max(scan // 256, 1),
            **dependent,
        )
        return plan
    counts, runs = plan.run_counts, plan.run_counts.shape[0]
    run = {"BLOCK_P": _run_length(num_pairs), **dependent}
    launch(count_run_kernel, (runs,), topk_ids, counts, num_pairs, num_experts, BLOCK_E=block_e, num_warps=4, **run)
    launch(
        place_runs_kernel,
        (runs + num_experts,),
        topk_ids,
        counts,
        plan.pairs,
        plan.rows,
        *blocks,
        num_pairs,
        runs,
        num_experts,
        **cut,
        BLOCK_C=max(_COUNTS // block_e, 1),
        num_warps=8,
        **run,
    )
    return plan


def quantize_and_route(
    x: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    topk_ids: torch.Tensor,
    num_experts: int,
    plan: RoutingPlan,
) -> RoutingPlan:
    """`quantize_rows` of x [R, N] into codes and scales, and `route_pairs`: in one launch where pairs are few."""
    from ..jit.routing import quantize_and_route_kernel

    num_pairs, (rows, width) = topk_ids.numel(), x.shape
    if num_pairs > _AT_ONCE:
        quantize_rows(x, codes=codes, scales=scales)
        return route_pairs(topk_ids, num_experts, plan)
    cut = row_constants(rows, width)
    launch(
        quantize_and_route_kernel,
        (num_experts + -(-rows // cut["ROWS"]),),
        x,
        codes,
        scales,
        topk_ids,
        plan.pairs,
        plan.rows,
        plan.block_expert,
        plan.block_first,
        plan.block_rows,
        plan.totals,
        x.stride(0),
        width,
        rows,
        num_pairs,
        num_experts,
        BLOCK_P=_scan(num_pairs),
        **cut,
        **_cut(num_experts, plan),
        **dependence(x.device),
    )
    return plan


def _cut(num_experts: int, plan: RoutingPlan) -> dict[str, int]:
    return {
        "BLOCK_M": plan.blocks.block_m,
        "TAIL_M": plan.blocks.tail_m,
        "BLOCK_E": max(next_power_of_2(num_experts), 2),
    }


def _scan(num_pairs: int) -> int:
    return max(next_power_of_2(num_pairs), 32)


def _run_length(num_pairs: int) -> int:
    return _RUN if num_pairs <= _MANY else _LONG_RUN


def route_constants(num_pairs: int) -> tuple[bool, int]:
    """The constants of the routing of so many pairs: whether it takes one launch, and the pairs of a program."""
    at_once = num_pairs <= _AT_ONCE
    return at_once, _scan(num_pairs) if at_once else _run_length(num_pairs)


def route_pairs_reference(topk_ids: torch.Tensor, num_experts: int, blocks: RowBlocks) -> RoutingPlan:
    """Torch twin of `route_pairs`; unused rows and blocks hold -1 here."""
    ids = topk_ids.reshape(-1)
    plan = empty_plan(ids.numel(), num_experts, blocks, topk_ids.device)
    for buffer in (plan.pairs, plan.rows, plan.block_expert, plan.block_first, plan.block_rows):
        buffer.fill_(-1)
    block = row = 0
    for expert in range(num_experts):
        members = torch.nonzero(ids == expert).flatten().to(torch.int32)
        left = members.numel()
        plan.pairs[row : row + left] = members
        plan.rows[members.long()] = torch.arange(row, row + left, dtype=torch.int32, device=topk_ids.device)
        while left:
            rows = left if left <= blocks.block_m + blocks.tail_m else blocks.block_m
            plan.block_expert[block], plan.block_first[block], plan.block_rows[block] = expert, row, rows
            block, row, left = block + 1, row + rows, left - rows
    plan.totals.copy_(torch.tensor([block, row, 0]))
    return plan
