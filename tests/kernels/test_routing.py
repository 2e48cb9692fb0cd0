"""Routing alignment: the layout against the torch twin, and the bound on its size."""

import itertools

import pytest
import torch

from quarkconv.kernels.routing import empty_plan, max_row_blocks, route_pairs, route_pairs_reference

POISON = -77


def poisoned_plan(pairs, experts, block_m, device):
    plan = empty_plan(pairs, experts, block_m, device)
    for buffer in (plan.pairs, plan.block_expert, plan.num_blocks):
        buffer.fill_(POISON)
    return plan


def check(ids, experts, block_m):
    plan = route_pairs(ids, experts, poisoned_plan(ids.numel(), experts, block_m, ids.device))
    twin = route_pairs_reference(ids, experts, block_m)
    blocks = twin.num_blocks.item()
    assert plan.num_blocks.item() == blocks
    assert torch.equal(plan.block_expert[:blocks], twin.block_expert[:blocks])
    assert torch.equal(plan.pairs[: blocks * block_m], twin.pairs[: blocks * block_m])
    # Nothing is written beyond the blocks in use, let alone beyond the buffers.
    assert (plan.block_expert[blocks:] == POISON).all()
    assert (plan.pairs[blocks * block_m :] == POISON).all()
    return twin


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts", "block_m"),
    [(1, 1, 1, 16), (1, 8, 12, 16), (7, 3, 5, 16), (33, 2, 3, 32), (50, 4, 8, 128), (2600, 2, 2, 64)],
)
def test_equals_twin(dtype, tokens, top_k, experts, block_m, device):
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=g).to(dtype).to(device)
    check(ids, experts, block_m)


def test_many_experts_most_of_them_empty(device):
    ids = torch.tensor([[511, 0], [511, 300]], dtype=torch.int32, device=device)
    twin = check(ids, 512, 16)
    assert twin.block_expert[:3].tolist() == [0, 300, 511]
    assert twin.pairs[:16].tolist() == [1] + [4] * 15


def test_one_expert_takes_all(device):
    check(torch.full((40, 1), 2, dtype=torch.int32, device=device), 4, 16)


def test_blocks_that_are_exactly_full(device):
    twin = check(torch.tensor([[0], [1]] * 16, dtype=torch.int32, device=device), 2, 16)
    assert twin.num_blocks.item() == 2


def test_ids_of_other_ranks_are_left_out(device):
    ids = torch.tensor([[-1, 4], [2**32 + 1, -(2**40)], [1, 3]], dtype=torch.int64, device=device)
    twin = check(ids, 4, 16)
    assert twin.num_blocks.item() == 2
    nothing = torch.full((5, 2), -1, dtype=torch.int32, device=device)
    assert check(nothing, 4, 16).num_blocks.item() == 0


@pytest.mark.parametrize("block_m", [1, 2, 3])
def test_bound_on_blocks_is_tight(block_m):
    for experts, pairs in itertools.product(range(1, 4), range(1, 8)):
        splits = (c for c in itertools.product(range(pairs + 1), repeat=experts) if sum(c) <= pairs)
        worst = max(sum(-(-count // block_m) for count in counts) for counts in splits)
        assert max_row_blocks(pairs, experts, block_m) == worst
