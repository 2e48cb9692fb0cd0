"""Routing alignment: the (token, slot) pairs sorted by expert, each expert padded to whole row blocks.

A grouped product wants every program's rows to share one expert. With c_e pairs for expert e and blocks of BM rows,
expert e gets ceil(c_e / BM) consecutive blocks; inside them its pairs stand in ascending order, followed by padding.
How many blocks that makes is known only on the device, so the buffers have the size of the worst case,

    max over routings of sum ceil(c_e / BM) = n + floor((P - n) / BM),    n = min(E, P),

and programs beyond the actual count return at once. Pairs whose id is outside 0..E-1 (-1: the expert is on another
rank) are left out.
"""

from dataclasses import dataclass

import torch

from .options import next_power_of_2

_MAX_SCAN = 4096  # ids looked at in one step


@dataclass(frozen=True, slots=True)
class RoutingPlan:
    """Pairs grouped by expert, on the device.

    pairs         int32 [max_blocks * block_m]: pair indices; P marks padding
    block_expert  int32 [max_blocks]: the expert of each block
    num_blocks    int32 [1]: the blocks in use; what lies beyond them in the other tensors is unspecified
    """

    block_m: int
    pairs: torch.Tensor
    block_expert: torch.Tensor
    num_blocks: torch.Tensor

    @property
    def max_blocks(self) -> int:
        return self.block_expert.numel()


def max_row_blocks(num_pairs: int, num_experts: int, block_m: int) -> int:
    """Most row blocks that any routing of `num_pairs` pairs over `num_experts` experts can need."""
    active = min(num_experts, num_pairs)
    return active + (num_pairs - active) // block_m


def empty_plan(num_pairs: int, num_experts: int, block_m: int, device: torch.device) -> RoutingPlan:
    """Uninitialized buffers for `route_pairs`."""
    blocks = max_row_blocks(num_pairs, num_experts, block_m)
    return RoutingPlan(
        block_m=block_m,
        pairs=torch.empty(blocks * block_m, dtype=torch.int32, device=device),
        block_expert=torch.empty(blocks, dtype=torch.int32, device=device),
        num_blocks=torch.empty(1, dtype=torch.int32, device=device),
    )


def route_pairs(topk_ids: torch.Tensor, num_experts: int, plan: RoutingPlan) -> RoutingPlan:
    """Launch the alignment of topk_ids (int32 or int64, P >= 1 elements) into the buffers of `plan`.

    Two launches: one program an expert counts its pairs, then one program an expert writes its blocks. Each reads all
    P ids, which stay in the second-level cache; in return there are no atomics, and the order is always the same.
    """
    from .routing_jit import count_pairs_kernel, place_pairs_kernel

    num_pairs = topk_ids.numel()
    counts = torch.empty(num_experts, dtype=torch.int32, device=topk_ids.device)
    scan = min(max(next_power_of_2(num_pairs), 32), _MAX_SCAN)
    warps = min(max(scan // 512, 1), 8)
    grid = (num_experts,)
    count_pairs_kernel[grid](topk_ids, counts, num_pairs, BLOCK_P=scan, num_warps=warps)
    place_pairs_kernel[grid](
        topk_ids,
        counts,
        plan.pairs,
        plan.block_expert,
        plan.num_blocks,
        num_pairs,
        num_experts,
        BLOCK_M=plan.block_m,
        BLOCK_E=next_power_of_2(num_experts),
        BLOCK_P=scan,
        num_warps=warps,
    )
    return plan


def route_pairs_reference(topk_ids: torch.Tensor, num_experts: int, block_m: int) -> RoutingPlan:
    """Torch twin of `route_pairs`; the unused tail holds padding and expert -1."""
    ids = topk_ids.reshape(-1)
    num_pairs = ids.numel()
    plan = empty_plan(num_pairs, num_experts, block_m, topk_ids.device)
    plan.pairs.fill_(num_pairs)
    plan.block_expert.fill_(-1)
    block = 0
    for expert in range(num_experts):
        members = torch.nonzero(ids == expert).flatten().to(torch.int32)
        blocks = -(-members.numel() // block_m)
        plan.pairs[block * block_m : block * block_m + members.numel()] = members
        plan.block_expert[block : block + blocks] = expert
        block += blocks
    plan.num_blocks.fill_(block)
    return plan
