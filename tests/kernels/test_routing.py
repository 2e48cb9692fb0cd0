"""Routing: the layout against the torch twin, and the bound on its size."""

import itertools
from typing import Any

import pytest
import torch

from quarkconv.kernels.arguments import RoutingPlan
from quarkconv.kernels.launch.routing import empty_plan, max_row_blocks, route_pairs, route_pairs_reference
from quarkconv.kernels.tables import RowBlocks

pytestmark = pytest.mark.long(10)

POISON = -77


def poisoned_plan(pairs: int, experts: int, blocks: RowBlocks, device: torch.device) -> RoutingPlan:
    plan = empty_plan(pairs, experts, blocks, device)
    for buffer in (plan.pairs, plan.rows, plan.block_expert, plan.block_first, plan.block_rows, plan.totals):
        buffer.fill_(POISON)
    return plan


def check(ids: torch.Tensor, experts: int, blocks: RowBlocks) -> Any:
    plan = route_pairs(ids, experts, poisoned_plan(ids.numel(), experts, blocks, ids.device))
    twin = route_pairs_reference(ids, experts, blocks)
    used, rows, _ = twin.totals.tolist()
    assert plan.totals.tolist() == [used, rows, 0]
    for name, count in (("pairs", rows), ("block_expert", used), ("block_first", used), ("block_rows", used)):
        found = getattr(plan, name)
        assert torch.equal(found[:count], getattr(twin, name)[:count]), name
        # Nothing is written beyond what is in use, let alone beyond the buffers.
        assert (found[count:] == POISON).all(), name
    here = ((ids >= 0) & (ids < experts)).flatten()
    assert plan.rows[plan.pairs[:rows].long()].tolist() == list(range(rows))
    assert (plan.rows[~here] == POISON).all()
    # Whatever the twin says: every pair with an expert is in exactly one block, and its block is of its expert.
    assert sorted(plan.pairs[:rows].tolist()) == torch.nonzero(here).flatten().tolist()
    seen = 0
    for expert, first, count in zip(
        plan.block_expert[:used].tolist(),
        plan.block_first[:used].tolist(),
        plan.block_rows[:used].tolist(),
        strict=True,
    ):
        assert first == seen
        assert 1 <= count <= blocks.block_m + blocks.tail_m
        assert (ids.flatten()[plan.pairs[first : first + count].long()] == expert).all()
        seen += count
    assert seen == rows
    return twin


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
@pytest.mark.parametrize("blocks", [RowBlocks(16), RowBlocks(16, 16), RowBlocks(32, 16, 16)], ids=str)
@pytest.mark.parametrize(
    ("tokens", "top_k", "experts"), [(1, 1, 1), (1, 8, 12), (7, 3, 5), (33, 2, 3), (50, 4, 8), (600, 2, 3)]
)
def test_the_order_of_pairs_equals_that_of_the_twin(
    dtype: torch.dtype, blocks: RowBlocks, tokens: int, top_k: int, experts: int, device: torch.device
) -> None:
    g = torch.Generator().manual_seed(tokens)
    ids = torch.randint(-1, experts, (tokens, top_k), generator=g).to(dtype).to(device)
    check(ids, experts, blocks)


@pytest.mark.gpu
def test_so_many_pairs_that_runs_are_longer(device: torch.device) -> None:
    ids = torch.randint(-1, 3, (2**16 + 5, 3), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    check(ids.to(device), 3, RowBlocks(128, 32, 64))


def test_empty_experts_have_no_blocks(device: torch.device) -> None:
    ids = torch.tensor([[199, 0], [199, 130]], dtype=torch.int32, device=device)
    twin = check(ids, 200, RowBlocks(16))
    assert twin.block_expert[:3].tolist() == [0, 130, 199]
    assert twin.pairs.tolist() == [1, 3, 0, 2]


@pytest.mark.parametrize(
    ("rows", "expected"), [(1, [1]), (16, [16]), (17, [17]), (20, [20]), (21, [16, 5]), (32, [16, 16]), (36, [16, 20])]
)
def test_what_remains_joins_the_last_block_if_it_is_short(rows: int, expected: Any, device: torch.device) -> None:
    twin = check(torch.full((rows, 1), 2, dtype=torch.int32, device=device), 4, RowBlocks(16, tail_m=4))
    assert twin.block_rows[: len(expected)].tolist() == expected
    assert twin.totals.tolist() == [len(expected), rows, 0]


def test_ids_of_other_ranks_are_left_out(device: torch.device) -> None:
    ids = torch.tensor([[-1, 4], [2**32 + 1, -(2**40)], [1, 3]], dtype=torch.int64, device=device)
    assert check(ids, 4, RowBlocks(16)).totals.tolist() == [2, 2, 0]
    for tokens in (5, 1100):  # in one launch, and in runs
        nothing = torch.full((tokens, 2), -1, dtype=torch.int32, device=device)
        assert check(nothing, 4, RowBlocks(16)).totals.tolist() == [0, 0, 0]


@pytest.mark.parametrize("block_m", [1, 2, 3])
def test_bound_on_blocks_is_tight(block_m: int) -> None:
    for experts, pairs in itertools.product(range(1, 4), range(1, 8)):
        splits = (c for c in itertools.product(range(pairs + 1), repeat=experts) if sum(c) <= pairs)
        worst = max(sum(-(-count // block_m) for count in counts) for counts in splits)
        assert max_row_blocks(pairs, experts, block_m) == worst


@pytest.mark.parametrize("experts", [3, 60, 128])
def test_buffers_of_the_plan_are_aligned_whatever_the_number_of_pairs(experts: int) -> None:
    """So that one compiled kernel serves them all."""
    for pairs in (*range(1, 40), 333, 1001):
        plan = empty_plan(pairs, experts, RowBlocks(16), torch.device("cpu"))
        for buffer in (plan.pairs, plan.rows, plan.block_expert, plan.block_first, plan.block_rows):
            assert buffer.data_ptr() % 16 == 0
            assert buffer.is_contiguous()
