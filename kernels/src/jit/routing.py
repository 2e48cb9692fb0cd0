# mypy: ignore-errors
"""The routing; `launch.routing` defines the layout.

A plan is a tuple: pointers to the pair of each row, the row of each pair, and of each block its expert, first row and
rows; and to the totals.
"""

import triton
import triton.language as tl

from .dependent import _trigger, _wait
from .quantize import _quantize_rows


@triton.jit
def _experts_of(ids, num_experts):
    """The experts of `ids` as i32; what is not an expert is number num_experts."""
    return tl.where((ids >= 0) & (ids < num_experts), ids, num_experts).to(tl.int32)


@triton.jit
def _count(ids, num_experts, BLOCK_E: tl.constexpr):
    """How often each expert occurs among `ids`. The others are counted as expert 0's and taken off again: a bin of
    their own would double the histogram of 2^n experts."""
    here = (ids >= 0) & (ids < num_experts)
    counts = tl.histogram(tl.where(here, ids, 0).to(tl.int32), BLOCK_E)
    others = tl.sum(tl.where(here, 0, 1), axis=0)
    return counts - tl.where(tl.arange(0, BLOCK_E) == 0, others, 0)


@triton.jit
def _first_row(counts, expert, BLOCK_E: tl.constexpr):
    return tl.sum(tl.where(tl.arange(0, BLOCK_E) < expert, counts, 0), axis=0)


@triton.jit
def _write_blocks(
    counts,  # i32 [BLOCK_E]: rows of every expert, 0 beyond
    expert,
    first_row,
    plan,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
):
    """The blocks of one expert, and for expert 0 the totals. The last block takes up to TAIL_M more than BLOCK_M."""
    pairs_ptr, rows_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr = plan
    experts = tl.arange(0, BLOCK_E)
    whole = counts // BLOCK_M
    rest = counts - whole * BLOCK_M
    blocks = whole + ((rest > TAIL_M) | ((rest > 0) & (whole == 0))).to(tl.int32)
    first_block = tl.sum(tl.where(experts < expert, blocks, 0), axis=0)
    own_rows = tl.sum(tl.where(experts == expert, counts, 0), axis=0)
    own_blocks = tl.sum(tl.where(experts == expert, blocks, 0), axis=0)
    if expert == 0:
        tl.store(totals_ptr, tl.sum(blocks, axis=0))
        tl.store(totals_ptr + 1, tl.sum(counts, axis=0))
        tl.store(totals_ptr + 2, 0)
    for start in range(0, own_blocks, BLOCK_E):
        block = start + experts
        mask = block < own_blocks
        rows = tl.where(block == own_blocks - 1, own_rows - block * BLOCK_M, BLOCK_M)
        tl.store(block_expert_ptr + first_block + block, expert + tl.zeros_like(block), mask=mask)
        tl.store(block_first_ptr + first_block + block, first_row + block * BLOCK_M, mask=mask)
        tl.store(block_rows_ptr + first_block + block, rows, mask=mask)


@triton.jit
def _place(ids, pairs, expert, start, plan):
    """Give those of `pairs` whose id is `expert` the rows from `start`."""
    pairs_ptr, rows_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr = plan
    mine = (ids == expert).to(tl.int32)
    rank = tl.cumsum(mine, axis=0) - 1
    tl.store(pairs_ptr + start + rank, pairs, mask=mine != 0)
    tl.store(rows_ptr + pairs, start + rank, mask=mine != 0)


@triton.jit
def _route_at_once(
    expert,
    topk_ids_ptr,
    plan,
    num_pairs,
    num_experts,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """One expert's part of the routing of few pairs: count all of them, and place its own."""
    pairs = tl.arange(0, BLOCK_P)
    ids = tl.load(topk_ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
    counts = _count(ids, num_experts, BLOCK_E)
    first_row = _first_row(counts, expert, BLOCK_E)
    _place(ids, pairs, expert, first_row, plan)
    _write_blocks(counts, expert, first_row, plan, BLOCK_M, TAIL_M, BLOCK_E)


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def route_at_once_kernel(
    topk_ids_ptr,  # int [P]
    pairs_ptr,  # i32 [P]: the pair of each row
    rows_ptr,  # i32 [P]: the row of each pair
    block_expert_ptr,  # i32 [max_blocks]
    block_first_ptr,  # i32 [max_blocks]
    block_rows_ptr,  # i32 [max_blocks]
    totals_ptr,  # i32 [3]
    num_pairs,
    num_experts,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_E: tl.constexpr,  # at least num_experts
    BLOCK_P: tl.constexpr,  # at least num_pairs
):
    """Grid: (experts,). A program counts all pairs (few), places those of one expert and writes its blocks."""
    _wait(DEPENDENT)
    _trigger(DEPENDENT)
    plan = (pairs_ptr, rows_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr)
    _route_at_once(tl.program_id(0), topk_ids_ptr, plan, num_pairs, num_experts, BLOCK_M, TAIL_M, BLOCK_E, BLOCK_P)


@triton.jit(do_not_specialize=["num_pairs", "num_experts", "num_rows"])
def quantize_and_route_kernel(
    x_ptr,  # float [R, N], rows row_stride apart
    codes_ptr,  # int8 [R, N]
    scale_ptr,  # f32 [R]
    topk_ids_ptr,  # int [P]
    pairs_ptr,  # i32 [P]: the pair of each row
    rows_ptr,  # i32 [P]: the row of each pair
    block_expert_ptr,  # i32 [max_blocks]
    block_first_ptr,  # i32 [max_blocks]
    block_rows_ptr,  # i32 [max_blocks]
    totals_ptr,  # i32 [3]
    row_stride,
    N,
    num_rows,
    num_pairs,
    num_experts,
    MIN_SCALE: tl.constexpr,
    INTERPRETED: tl.constexpr,
    DEPENDENT: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: (experts + row groups,). The first programs do what `route_at_once_kernel` does, the others quantize ROWS
    rows each by their own scales."""
    _wait(DEPENDENT)
    _trigger(DEPENDENT)
    program = tl.program_id(0)
    if program < num_experts:
        plan = (pairs_ptr, rows_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr)
        _route_at_once(program, topk_ids_ptr, plan, num_pairs, num_experts, BLOCK_M, TAIL_M, BLOCK_E, BLOCK_P)
    else:
        rows = ((program - num_experts) * ROWS + tl.arange(0, ROWS)).to(tl.int64)
        _quantize_rows(
            x_ptr + (rows * row_stride)[:, None], codes_ptr, scale_ptr, (rows,), (rows < num_rows,), None, None,
            rows < num_rows, N, MIN_SCALE, INTERPRETED, ROWS, BLOCK_N, CHUNKS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_pairs", "num_experts"])
def count_run_kernel(
    topk_ids_ptr,  # int [P]
    counts_ptr,  # i32 [C, E]
    num_pairs,
    num_experts,
    DEPENDENT: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: (runs,). A program c counts, for each expert e, the pairs of the c-th run of BLOCK_P: counts[c, e]."""
    _wait(DEPENDENT)
    _trigger(DEPENDENT)
    run = tl.program_id(0)
    pairs = run * BLOCK_P + tl.arange(0, BLOCK_P)
    ids = tl.load(topk_ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
    experts = tl.arange(0, BLOCK_E)
    tl.store(counts_ptr + run * num_experts + experts, _count(ids, num_experts, BLOCK_E), mask=experts < num_experts)


@triton.jit
def _sum_runs(counts_ptr, run, num_runs, num_experts, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr):
    """(pairs of each expert in the runs before `run`, in all runs), both i32 [BLOCK_E], 0 beyond the experts."""
    experts = tl.arange(0, BLOCK_E)
    before = tl.zeros([BLOCK_E], dtype=tl.int32)
    total = tl.zeros([BLOCK_E], dtype=tl.int32)
    for first in range(0, num_runs, BLOCK_C):
        runs = first + tl.arange(0, BLOCK_C)
        is_count = (runs < num_runs)[:, None] & (experts < num_experts)[None, :]
        counts = tl.load(counts_ptr + runs[:, None] * num_experts + experts[None, :], mask=is_count, other=0)
        before += tl.sum(tl.where((runs < run)[:, None], counts, 0), axis=0)
        total += tl.sum(counts, axis=0)
    return before, total


@triton.jit(do_not_specialize=["num_pairs", "num_runs", "num_experts"])
def place_runs_kernel(
    topk_ids_ptr,  # int [P]
    counts_ptr,  # i32 [C, E]
    pairs_ptr,  # i32 [P]: the pair of each row
    rows_ptr,  # i32 [P]: the row of each pair
    block_expert_ptr,  # i32 [max_blocks]
    block_first_ptr,  # i32 [max_blocks]
    block_rows_ptr,  # i32 [max_blocks]
    totals_ptr,  # i32 [3]
    num_pairs,
    num_runs,
    num_experts,
    DEPENDENT: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TAIL_M: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_P: tl.constexpr,
):
    """Grid: (runs + experts,). One of the first C programs sorts the pairs of a run by expert, then by number, and
    gives them their rows. One of the E programs after them writes the blocks of an expert."""
    program = tl.program_id(0)
    if program < num_runs:
        place = tl.arange(0, BLOCK_P)
        pairs = program * BLOCK_P + place
        ids = tl.load(topk_ids_ptr + pairs, mask=pairs < num_pairs, other=-1)
        keys = tl.sort(_experts_of(ids, num_experts) * BLOCK_P + place)
        # Only now: what has been read so far is not of the launch before this one.
        _wait(DEPENDENT)
        _trigger(DEPENDENT)
        before, total = _sum_runs(counts_ptr, program, num_runs, num_experts, BLOCK_E, BLOCK_C)
        experts = tl.arange(0, BLOCK_E)
        own = tl.load(counts_ptr + program * num_experts + experts, mask=experts < num_experts, other=0)
        # Of each expert, the row of its first pair in this run, less the pairs of the run that are sorted before it.
        starts = tl.cumsum(total - own, axis=0) - (total - own) + before
        experts, pairs = keys // BLOCK_P, program * BLOCK_P + keys % BLOCK_P
        is_here = experts < num_experts
        rows = place + tl.gather(starts, tl.minimum(experts, BLOCK_E - 1), axis=0)
        tl.store(pairs_ptr + rows, pairs, mask=is_here)
        tl.store(rows_ptr + pairs, rows, mask=is_here)
    else:
        _wait(DEPENDENT)
        _trigger(DEPENDENT)
        expert = program - num_runs
        _, counts = _sum_runs(counts_ptr, 0, num_runs, num_experts, BLOCK_E, BLOCK_C)
        plan = (pairs_ptr, rows_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr)
        _write_blocks(counts, expert, _first_row(counts, expert, BLOCK_E), plan, BLOCK_M, TAIL_M, BLOCK_E)
