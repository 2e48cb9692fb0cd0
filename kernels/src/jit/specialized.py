# mypy: ignore-errors
"""The warp-specialized, persistent grouped GEMM for Hopper, in Gluon; `launch.grouped_gemm` defines the arithmetic.

A program stays on its SM for the whole launch and takes tiles of the result until none is left:

    producer       one warp. Copies operands to shared memory by TMA, up to STAGES steps ahead and across the end of a
                   tile, and takes the next tile by an atomic counter
    two consumers  four warps (a warpgroup) each: wgmma, scales, activation, stores. With PARTS 1 they ping-pong: each
                   has its own tile, and one multiplies while the other runs its epilogue. With PARTS 2 they cooperate
                   on a tile of twice the width: a tile of activations serves twice as many weights, and L2 delivers a
                   quarter fewer bytes for the same sums. With many rows per expert, L2 is what limits 128 x 128 tiles

A step is a run of BLOCK_D codes of the summed dimension: 128 rows of weights (64 of gate and 64 of up, or 128 output
columns; PARTS times as many) by BLOCK_M rows of activations, in sorted order, and up to TAIL_M more.

Barriers in shared memory (mbarrier), each of which counts arrivals in phases:

    full, empty    [STAGES]  the operands of a step have arrived; all consumers have read them
    known          [SLOTS]   the next tile is known; a tile without rows follows the last
    turn           [2]       a consumer may multiply (PARTS 1)

A wait identifies a phase by its parity only, so a waiter must never be two phases off. For `full`, with PARTS 1, the
turns ensure it: a consumer starts when the other one has seen all of its own steps. With PARTS 2, both empty a step
before it is filled again. For `known` it is enough that a consumer has seen the tile two before. A slot is free when it
is written again: the producer is at most STAGES steps ahead, and there are STAGES + 2 slots.

Values that belong together travel as tuples:

    ring    (weights, rows, tail rows, full, empty, turn) in shared memory
    slots   (tiles, known) in shared memory
    plan    (pairs, block experts, block first rows, block rows, tile counter), pointers
    sizes   (row blocks, column blocks, D, N)
    result  (output, row scales, weight scales, biases or None, router weights or None), pointers
    block   (expert, first row, rows, column block) of a tile
    limits  (limit, alpha) of the activation
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .dependent import _trigger, _wait
from .grouped_gemm import _tile_of
from .specialized_finish import HALF, _channels_of_halves, _finish, _layout_of_sums, _none, _of_rows, _pieces

_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared  # its name before Triton 3.9

_ONE_WARP = gl.constexpr(gl.BlockedLayout([1], [32], [1], [0]))
_FOUR_WARPS = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))


@gluon.jit
def _block_of(tile, plan, sizes, GROUP_M: gl.constexpr):
    """(expert, first row, rows, column block) of a tile."""
    row_blocks, col_blocks, D, N = sizes
    pairs_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, counter_ptr = plan
    row_block, col_block = _tile_of(tile, row_blocks, col_blocks, GROUP_M)
    expert = gl.load(block_expert_ptr + row_block)
    first = gl.load(block_first_ptr + row_block)
    return expert, first, gl.load(block_rows_ptr + row_block), col_block


@gluon.jit
def _announce(slots, number, block, SLOTS: gl.constexpr):
    tiles, known = slots
    for i in gl.static_range(4):
        tiles.index(number % SLOTS * 4 + i).store(gl.full([1], block[i], gl.int32, _ONE_WARP))
    mbarrier.arrive(known.index(number % SLOTS))


@gluon.jit
def _await_tile(slots, number, SLOTS: gl.constexpr):
    tiles, known = slots
    mbarrier.wait(known.index(number % SLOTS), (number // SLOTS) & 1)
    block = ()
    for i in gl.static_range(4):
        block += (gl.max(tiles.index(number % SLOTS * 4 + i).load(_FOUR_WARPS), 0),)
    return block


@gluon.jit
def _produce(
    ring, slots, descriptors, plan, sizes, PARTS: gl.constexpr, GATED: gl.constexpr, BLOCK_M: gl.constexpr,
    TAIL_M: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The producer warp: take tiles and copy their operands."""
    weights, rows_main, rows_tail, full, empty, turn = ring
    weight_desc, codes_desc, tail_desc = descriptors
    row_blocks, col_blocks, D, N = sizes
    pairs_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, counter_ptr = plan
    tiles = row_blocks * col_blocks
    WITHOUT_TAIL: gl.constexpr = 2 * weight_desc.block_type.nbytes + codes_desc.block_type.nbytes
    number = 0
    step = 0
    tile = gl.program_id(0)
    while tile < tiles:
        # Taken early: it is needed only when this tile's copies are issued. The last ticket resets the counter.
        ticket = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if ticket == tiles - 1:
            gl.store(counter_ptr, 0)
        expert, first, rows, col_block = _block_of(tile, plan, sizes, GROUP_M)
        _announce(slots, number, (expert, first, rows, col_block), SLOTS)
        if GATED:
            lower = expert * (2 * N) + col_block * (HALF * PARTS)
            upper = lower + N
        else:
            lower = expert * N + col_block * (2 * HALF * PARTS)
            upper = lower + HALF * PARTS
        for start in range(0, D, BLOCK_D):
            at = step % STAGES
            ready = full.index(at)
            mbarrier.wait(empty.index(at), (step // STAGES + 1) & 1)
            if TAIL_M:
                if rows > BLOCK_M:
                    mbarrier.expect(ready, WITHOUT_TAIL + tail_desc.block_type.nbytes)
                    _load(tail_desc, [first + BLOCK_M, start], ready, rows_tail.index(at))
                else:
                    mbarrier.expect(ready, WITHOUT_TAIL)
            else:
                mbarrier.expect(ready, WITHOUT_TAIL)
            _load(weight_desc, [lower, start], ready, weights.index(2 * at))
            _load(weight_desc, [upper, start], ready, weights.index(2 * at + 1))
            _load(codes_desc, [first, start], ready, rows_main.index(at))
            step += 1
        tile = ticket + gl.num_programs(0)
        number += 1
    for i in gl.static_range(2):
        _announce(slots, number + i, (0, 0, 0, 0), SLOTS)


@gluon.jit
def _sums(
    ring, number, steps, WHO: gl.constexpr, PARTS: gl.constexpr, BLOCK_M: gl.constexpr, TAIL_M: gl.constexpr,
    ROWS: gl.constexpr, TAIL: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """The sums of a tile for ROWS rows and, with TAIL, a tail of TAIL: (lower half, upper half), each as pieces."""
    weights, rows_main, rows_tail, full, empty, turn = ring
    LAYOUT: gl.constexpr = _layout_of_sums(ROWS)
    lower = gl.zeros([HALF, ROWS], gl.int32, LAYOUT)
    upper = gl.zeros([HALF, ROWS], gl.int32, LAYOUT)
    if TAIL:
        TAIL_LAYOUT: gl.constexpr = _layout_of_sums(TAIL)
        tail_lower = gl.zeros([HALF, TAIL], gl.int32, TAIL_LAYOUT)
        tail_upper = gl.zeros([HALF, TAIL], gl.int32, TAIL_LAYOUT)
    if PARTS == 1:
        mbarrier.wait(turn.index(WHO), (number // 2 + 1 + WHO) & 1)
    first = number * steps
    for step in range(first, first + steps):
        at = step % STAGES
        mbarrier.wait(full.index(at), (step // STAGES) & 1)
        w = weights.index(2 * at)
        upper_w = weights.index(2 * at + 1)
        if PARTS == 2:
            w = w.slice(WHO * HALF, HALF)
            upper_w = upper_w.slice(WHO * HALF, HALF)
        x = rows_main.index(at)
        if ROWS < BLOCK_M:
            x = x.slice(0, ROWS)
        lower = warpgroup_mma(w, x.permute((1, 0)), lower, is_async=True)
        upper = warpgroup_mma(upper_w, x.permute((1, 0)), upper, is_async=True)
        # One step stays in flight. Once it has started, the step before it has read its operands.
        if TAIL:
            x = rows_tail.index(at).permute((1, 0))
            tail_lower = warpgroup_mma(w, x, tail_lower, is_async=True)
            tail_upper = warpgroup_mma(upper_w, x, tail_upper, is_async=True)
            lower, upper, tail_lower, tail_upper = warpgroup_mma_wait(4, deps=(lower, upper, tail_lower, tail_upper))
        else:
            lower, upper = warpgroup_mma_wait(2, deps=(lower, upper))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=step > first)
    if PARTS == 1:
        mbarrier.arrive(turn.index(1 - WHO))
    if TAIL:
        lower, upper, tail_lower, tail_upper = warpgroup_mma_wait(0, deps=(lower, upper, tail_lower, tail_upper))
    else:
        lower, upper = warpgroup_mma_wait(0, deps=(lower, upper))
    mbarrier.arrive(empty.index((first + steps - 1) % STAGES))
    lower, upper = _pieces(lower, PIECE), _pieces(upper, PIECE)
    if TAIL:
        lower += _pieces(tail_lower, PIECE)
        upper += _pieces(tail_upper, PIECE)
    else:
        lower += _none((BLOCK_M + TAIL_M - ROWS) // PIECE, PIECE)
        upper += _none((BLOCK_M + TAIL_M - ROWS) // PIECE, PIECE)
    return lower, upper


@gluon.jit
def _sums_without_tail(
    ring, number, steps, rows, WHO: gl.constexpr, PARTS: gl.constexpr, BLOCK_M: gl.constexpr, TAIL_M: gl.constexpr,
    SMALL_M: gl.constexpr, PIECE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    if SMALL_M:
        if rows <= SMALL_M:
            lower, upper = _sums(ring, number, steps, WHO, PARTS, BLOCK_M, TAIL_M, SMALL_M, 0, PIECE, STAGES)
        else:
            lower, upper = _sums(ring, number, steps, WHO, PARTS, BLOCK_M, TAIL_M, BLOCK_M, 0, PIECE, STAGES)
    else:
        lower, upper = _sums(ring, number, steps, WHO, PARTS, BLOCK_M, TAIL_M, BLOCK_M, 0, PIECE, STAGES)
    return lower, upper


@gluon.jit
def _tile(
    ring, number, block, plan, sizes, result, limits, WHO: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr,
    SORTED: gl.constexpr, ACTIVATION: gl.constexpr, PER_CHANNEL: gl.constexpr, RAW_SUMS: gl.constexpr,
    BLOCK_M: gl.constexpr, TAIL_M: gl.constexpr, SMALL_M: gl.constexpr, BLOCK_D: gl.constexpr, PIECE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    expert, first, rows, col_block = block
    row_blocks, col_blocks, D, N = sizes
    pairs_ptr = plan[0]
    APART: gl.constexpr = HALF * PARTS  # how far the columns of the upper half are from the lower half's, for down
    col = col_block * (APART if GATED else 2 * APART) + WHO * (APART - HALF)
    columns = (col, col + (N if GATED else APART), N, 2 * N if GATED else N)
    # Loaded before the sums, so that the latency overlaps them.
    channels = _channels_of_halves(expert, columns, result, PER_CHANNEL, PIECE)
    ahead = _of_rows(0, block, pairs_ptr, result, SORTED, PIECE)
    steps = gl.cdiv(D, BLOCK_D)
    if TAIL_M:
        if rows > BLOCK_M:
            lower, upper = _sums(ring, number, steps, WHO, PARTS, BLOCK_M, TAIL_M, BLOCK_M, TAIL_M, PIECE, STAGES)
        else:
            lower, upper = _sums_without_tail(
                ring, number, steps, rows, WHO, PARTS, BLOCK_M, TAIL_M, SMALL_M, PIECE, STAGES
            )
    else:
        lower, upper = _sums_without_tail(
            ring, number, steps, rows, WHO, PARTS, BLOCK_M, TAIL_M, SMALL_M, PIECE, STAGES
        )
    _finish(
        lower, upper, channels, ahead, block, pairs_ptr, columns, result, limits, GATED, SORTED, ACTIVATION, RAW_SUMS,
        PIECE,
    )  # fmt: skip


@gluon.jit
def _consume(
    ring, slots, plan, sizes, result, limits, WHO: gl.constexpr, PARTS: gl.constexpr, GATED: gl.constexpr,
    SORTED: gl.constexpr, ACTIVATION: gl.constexpr, PER_CHANNEL: gl.constexpr, RAW_SUMS: gl.constexpr,
    BLOCK_M: gl.constexpr, TAIL_M: gl.constexpr, SMALL_M: gl.constexpr, BLOCK_D: gl.constexpr, PIECE: gl.constexpr,
    STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """A consumer warpgroup: every second tile of the program (PARTS 1), or half of every tile (PARTS 2)."""
    number = 0 + WHO * (2 - PARTS)
    expert, first, rows, col_block = _await_tile(slots, number, SLOTS)
    while rows > 0:
        block = (expert, first, rows, col_block)
        _tile(
            ring, number, block, plan, sizes, result, limits, WHO, PARTS, GATED, SORTED, ACTIVATION, PER_CHANNEL,
            RAW_SUMS, BLOCK_M, TAIL_M, SMALL_M, BLOCK_D, PIECE, STAGES,
        )  # fmt: skip
        number += 2 // PARTS
        expert, first, rows, col_block = _await_tile(slots, number, SLOTS)


@gluon.jit
def specialized_product_kernel(
    codes_desc,  # descriptor of i8 [rows, D] in sorted order, for BLOCK_M rows
    tail_desc,  # the same for TAIL_M rows, or None
    row_scale_ptr,  # f32 [rows]
    weight_desc,  # descriptor of i8 [E * N, D] for HALF rows; for GATED [E * 2N, D]: N gate rows, then N up rows
    weight_scale_ptr,  # f32 [E, N], [E, 2N] or [E]
    bias_ptr,  # float [E, N] or [E, 2N], or None
    router_weight_ptr,  # f32 [P] or None; for SORTED
    out_ptr,  # float [P, N], in sorted order or in that of pairs; for RAW_SUMS i32 [P, N], for GATED [P, 2N]
    pairs_ptr,  # i32 [P]
    block_expert_ptr,  # i32 [max_blocks]
    block_first_ptr,  # i32 [max_blocks]
    block_rows_ptr,  # i32 [max_blocks]
    totals_ptr,  # i32 [3]: blocks, rows, and what tiles are counted with: 0, and 0 again afterwards
    D,
    N,
    limit,
    alpha,
    ACTIVATION: gl.constexpr,
    PER_CHANNEL: gl.constexpr,
    RAW_SUMS: gl.constexpr,
    DEPENDENT: gl.constexpr,
    GATED: gl.constexpr,
    SORTED: gl.constexpr,
    PARTS: gl.constexpr,
    BLOCK_M: gl.constexpr,
    TAIL_M: gl.constexpr,
    SMALL_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    PIECE: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Grid: (SMs,), or fewer where there are fewer tiles. A program computes tiles of one row block by 64 * PARTS
    columns of gate and up, or 128 * PARTS columns of down, taken from a counter."""
    SLOTS: gl.constexpr = STAGES + 2
    LAYOUT: gl.constexpr = weight_desc.layout
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    weights = gl.allocate_shared_memory(gl.int8, [2 * STAGES, HALF * PARTS, BLOCK_D], LAYOUT)
    rows_main = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_D], LAYOUT)
    if TAIL_M:
        rows_tail = gl.allocate_shared_memory(gl.int8, [STAGES, TAIL_M, BLOCK_D], LAYOUT)
    else:
        rows_tail: gl.constexpr = None
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    if PARTS == 1:
        turn = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    else:  # an unused allocation would share its memory with the epilogue's conversions
        turn: gl.constexpr = None
    known = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    tiles = gl.allocate_shared_memory(gl.int32, [4 * SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=PARTS)
    if PARTS == 1:
        for i in gl.static_range(2):
            mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(known.index(i), count=1)
    fence_async_shared()
    _wait(DEPENDENT)
    _trigger(DEPENDENT)

    ring = (weights, rows_main, rows_tail, full, empty, turn)
    slots = (tiles, known)
    plan = (pairs_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr + 2)
    sizes = (gl.load(totals_ptr), gl.cdiv(N, HALF * PARTS if GATED else 2 * HALF * PARTS), D, N)
    result = (out_ptr, row_scale_ptr, weight_scale_ptr, bias_ptr, router_weight_ptr)
    # An SM has 168 registers per thread for twelve warps; the producer gives most of its own to the consumers.
    gl.warp_specialize(
        [
            (
                _consume,
                (
                    ring, slots, plan, sizes, result, (limit, alpha), 0, PARTS, GATED, SORTED, ACTIVATION, PER_CHANNEL,
                    RAW_SUMS, BLOCK_M, TAIL_M, SMALL_M, BLOCK_D, PIECE, STAGES, SLOTS,
                ),
            ),
            (
                _consume,
                (
                    ring, slots, plan, sizes, result, (limit, alpha), 1, PARTS, GATED, SORTED, ACTIVATION, PER_CHANNEL,
                    RAW_SUMS, BLOCK_M, TAIL_M, SMALL_M, BLOCK_D, PIECE, STAGES, SLOTS,
                ),
            ),
            (
                _produce,
                (
                    ring, slots, (weight_desc, codes_desc, tail_desc), plan, sizes, PARTS, GATED, BLOCK_M, TAIL_M,
                    BLOCK_D, GROUP_M, STAGES, SLOTS,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
