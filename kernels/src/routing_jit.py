# mypy: ignore-errors
"""Jitted code of the routing alignment; `routing` defines the layout and launches it."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_pairs"])
def count_pairs_kernel(
    topk_ids_ptr,  # int [P]
    counts_ptr,  # i32 [E]
    num_pairs,
    BLOCK_P: tl.constexpr,
):
    """counts[e] = pairs routed to e, for e the program's index."""
    expert = tl.program_id(0)
    found = tl.zeros([BLOCK_P], dtype=tl.int32)
    for start in range(0, num_pairs, BLOCK_P):
        pairs = start + tl.arange(0, BLOCK_P)
        ids = tl.load(topk_ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
        found += (ids == expert).to(tl.int32)
    tl.store(counts_ptr + expert, tl.sum(found, axis=0))


@triton.jit(do_not_specialize=["num_pairs"])
def place_pairs_kernel(
    topk_ids_ptr,  # int [P]
    counts_ptr,  # i32 [E]
    pairs_ptr,  # i32 [max_blocks * BLOCK_M]
    block_expert_ptr,  # i32 [max_blocks]
    num_blocks_ptr,  # i32 [1]
    num_pairs,
    num_experts,
    BLOCK_M: tl.constexpr,
    BLOCK_E: tl.constexpr,  # at least num_experts
    BLOCK_P: tl.constexpr,
):
    """Write the blocks of one expert: its pairs in ascending order, then padding."""
    expert = tl.program_id(0)
    experts = tl.arange(0, BLOCK_E)
    counts = tl.load(counts_ptr + experts, mask=experts < num_experts, other=0)
    blocks = (counts + BLOCK_M - 1) // BLOCK_M
    # Every program sums the counts again: cheaper than a third launch to do it once.
    first_block = tl.sum(tl.where(experts < expert, blocks, 0), axis=0)
    own_blocks = tl.sum(tl.where(experts == expert, blocks, 0), axis=0)
    own_pairs = tl.sum(tl.where(experts == expert, counts, 0), axis=0)
    if expert == 0:
        tl.store(num_blocks_ptr, tl.sum(blocks, axis=0))

    for start in range(0, own_blocks, BLOCK_E):
        block = start + experts
        tl.store(block_expert_ptr + first_block + block, expert + tl.zeros_like(block), mask=block < own_blocks)

    first_row = first_block * BLOCK_M
    padding = own_pairs + tl.arange(0, BLOCK_M)
    tl.store(pairs_ptr + first_row + padding, num_pairs + tl.zeros_like(padding), mask=padding < own_blocks * BLOCK_M)

    if own_pairs > 0:
        placed = 0
        for start in range(0, num_pairs, BLOCK_P):
            pairs = start + tl.arange(0, BLOCK_P)
            ids = tl.load(topk_ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
            mine = (ids == expert).to(tl.int32)
            rank = placed + tl.cumsum(mine, axis=0) - 1
            tl.store(pairs_ptr + first_row + rank, pairs, mask=mine != 0)
            placed += tl.sum(mine, axis=0)
