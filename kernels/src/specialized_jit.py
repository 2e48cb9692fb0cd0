# mypy: ignore-errors
"""The grouped products for many rows on Hopper, in Gluon: warps that have different things to do. `specialized`
launches it; the arithmetic is that of `grouped_gemm`, bit for bit.

A program stays on its processor for the whole launch and takes tiles of the result, one after the other, until none is
left. Its warps play three parts:

    one warp       brings in the operands, as far ahead as there is room: STAGES steps of the sums, across the end of a
                   tile, and takes the next tile by an atomic counter
    two groups of  multiply, in turns: while one multiplies its tile, the other one finishes the tile before, that is
    four warps     scales, activation, store. So the matrix units need not wait for an epilogue

A step is a run of BLOCK_D codes of the summed dimension: 128 rows of weights (64 of gate and 64 of up, or 128 output
columns) by BLOCK_M rows of activations, in sorted order, and up to TAIL_M more. All of it is brought in by the copy
engine through tensor descriptors; there are no pointers to compute and no registers on the way.

They tell each other by barriers in shared memory, of which each counts arrivals in phases:

    full, empty    [STAGES]  a step's operands are there; have been multiplied and may be overwritten
    told           [SLOTS]   a tile's number is there; -1 after the last one
    turn           [2]       a group may multiply

Whoever waits names a phase by its parity alone, so he must not be two phases late or early. For `full` the turns see to
that: a group starts when the other one has seen all of its own steps. For `told` it is enough that a group has seen the
number two tiles before. A slot is free when it is written anew: the warp that brings operands is at most STAGES steps
ahead, and there are two more slots than that.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from .dependent_jit import _trigger, _wait
from .epilogue_jit import _activate
from .grouped_gemm_jit import _tile_of

HALF = tl.constexpr(64)  # rows of weights in one matrix instruction; a tile has two halves
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
def _tell(slots, number, tile, SLOTS: gl.constexpr):
    tiles, told = slots
    tiles.index(number % SLOTS).store(gl.full([1], tile, gl.int32, _ONE_WARP))
    mbarrier.arrive(told.index(number % SLOTS))


@gluon.jit
def _told(slots, number, SLOTS: gl.constexpr):
    tiles, told = slots
    mbarrier.wait(told.index(number % SLOTS), (number // SLOTS) & 1)
    return gl.max(tiles.index(number % SLOTS).load(_FOUR_WARPS), 0)


@gluon.jit
def _bring(
    ring, slots, descriptors, plan, sizes, GATED: gl.constexpr, BLOCK_M: gl.constexpr, TAIL_M: gl.constexpr,
    BLOCK_D: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """The one warp: take tiles and bring in their operands."""
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
        # Taken now, since the answer is needed only when this tile is on its way. Who draws the last ticket leaves the
        # counter as it was found.
        ticket = gl.atomic_add(counter_ptr, 1, sem="relaxed")
        if ticket == tiles - 1:
            gl.store(counter_ptr, 0)
        _tell(slots, number, tile, SLOTS)
        expert, first, rows, col_block = _block_of(tile, plan, sizes, GROUP_M)
        if GATED:
            lower = expert * (2 * N) + col_block * HALF
            upper = lower + N
        else:
            lower = expert * N + col_block * (2 * HALF)
            upper = lower + HALF
        for start in range(0, D, BLOCK_D):
            at = step % STAGES
            ready = full.index(at)
            mbarrier.wait(empty.index(at), (step // STAGES + 1) & 1)
            if TAIL_M:
                if rows > BLOCK_M:
                    mbarrier.expect(ready, WITHOUT_TAIL + tail_desc.block_type.nbytes)
                    tma.async_copy_global_to_shared(tail_desc, [first + BLOCK_M, start], ready, rows_tail.index(at))
                else:
                    mbarrier.expect(ready, WITHOUT_TAIL)
            else:
                mbarrier.expect(ready, WITHOUT_TAIL)
            tma.async_copy_global_to_shared(weight_desc, [lower, start], ready, weights.index(2 * at))
            tma.async_copy_global_to_shared(weight_desc, [upper, start], ready, weights.index(2 * at + 1))
            tma.async_copy_global_to_shared(codes_desc, [first, start], ready, rows_main.index(at))
            step += 1
        tile = ticket + gl.num_programs(0)
        number += 1
    _tell(slots, number, -1, SLOTS)
    _tell(slots, number + 1, -1, SLOTS)


@gluon.jit
def _sums(
    ring, number, steps, WHO: gl.constexpr, BLOCK_M: gl.constexpr, ROWS: gl.constexpr, TAIL: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """The sums of a tile, i32 [HALF, ROWS]: (lower half, upper half), and for TAIL those of the tail's rows too."""
    weights, rows_main, rows_tail, full, empty, turn = ring
    LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32])
    lower = gl.zeros([HALF, ROWS], gl.int32, LAYOUT)
    upper = gl.zeros([HALF, ROWS], gl.int32, LAYOUT)
    if TAIL:
        TAIL_LAYOUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, TAIL, 32])
        tail_lower = gl.zeros([HALF, TAIL], gl.int32, TAIL_LAYOUT)
        tail_upper = gl.zeros([HALF, TAIL], gl.int32, TAIL_LAYOUT)
    mbarrier.wait(turn.index(WHO), (number // 2 + 1 + WHO) & 1)
    first = number * steps
    for step in range(first, first + steps):
        at = step % STAGES
        mbarrier.wait(full.index(at), (step // STAGES) & 1)
        x = rows_main.index(at)
        if ROWS < BLOCK_M:
            x = x.slice(0, ROWS)
        lower = warpgroup_mma(weights.index(2 * at), x.permute((1, 0)), lower, is_async=True)
        upper = warpgroup_mma(weights.index(2 * at + 1), x.permute((1, 0)), upper, is_async=True)
        # One step is left running; that it has begun means that the one before it has read its operands.
        if TAIL:
            x = rows_tail.index(at).permute((1, 0))
            tail_lower = warpgroup_mma(weights.index(2 * at), x, tail_lower, is_async=True)
            tail_upper = warpgroup_mma(weights.index(2 * at + 1), x, tail_upper, is_async=True)
            lower, upper, tail_lower, tail_upper = warpgroup_mma_wait(4, deps=(lower, upper, tail_lower, tail_upper))
        else:
            lower, upper = warpgroup_mma_wait(2, deps=(lower, upper))
        mbarrier.arrive(empty.index((step + STAGES - 1) % STAGES), pred=step > first)
    mbarrier.arrive(turn.index(1 - WHO))
    if TAIL:
        lower, upper, tail_lower, tail_upper = warpgroup_mma_wait(0, deps=(lower, upper, tail_lower, tail_upper))
    else:
        lower, upper = warpgroup_mma_wait(0, deps=(lower, upper))
    mbarrier.arrive(empty.index((first + steps - 1) % STAGES))
    return (lower, upper, tail_lower, tail_upper) if TAIL else (lower, upper)


@gluon.jit
def _row_scale(offset, block, plan, result, ROWS: gl.constexpr):
    """f32 [ROWS] as the sums are laid out, of the rows from `offset` of a block; those past its end repeat its last."""
    expert, first, rows, col_block = block
    pairs_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, counter_ptr = plan
    out_ptr, row_scale_ptr, weight_scale_ptr, bias_ptr, router_weight_ptr = result
    LAYOUT: gl.constexpr = gl.SliceLayout(0, gl.NVMMADistributedLayout([3, 0], [4, 1], [16, ROWS, 32]))
    row = first + gl.minimum(offset + gl.arange(0, ROWS, LAYOUT), rows - 1)
    scale = gl.load(row_scale_ptr + row)
    if router_weight_ptr is not None:
        scale *= gl.load(router_weight_ptr + gl.load(pairs_ptr + row))
    return scale


@gluon.jit
def _dequantized(sums, row_scale, block, col, N, total_cols, result, PER_CHANNEL: gl.constexpr):
    """sums * row scale * weight scale + bias, of the columns col + 0..HALF-1, of which N are in range."""
    expert, first, rows, col_block = block
    out_ptr, row_scale_ptr, weight_scale_ptr, bias_ptr, router_weight_ptr = result
    cols = col + gl.arange(0, HALF, gl.SliceLayout(1, sums.type.layout))
    channels = expert.to(gl.int64) * total_cols + cols
    values = sums.to(gl.float32) * row_scale[None, :]
    if PER_CHANNEL:
        scale = gl.load(weight_scale_ptr + channels, mask=cols < N, other=0.0)[:, None]
    else:
        scale = gl.load(weight_scale_ptr + expert)
    if bias_ptr is None:
        values *= scale
    else:
        bias = gl.load(bias_ptr + channels, mask=cols < N, other=0.0).to(gl.float32)[:, None]
        LAYOUT: gl.constexpr = values.type.layout
        zeros = gl.zeros([HALF, values.shape[1]], gl.float32, LAYOUT)
        values = gl.fma(values, scale + zeros, bias + zeros)
    return values


@gluon.jit
def _put(values, offset, block, col, N, total_cols, plan, result, GATED: gl.constexpr):
    """Store [HALF, rows] to the columns col + 0..HALF-1, of which N are in range."""
    expert, first, rows, col_block = block
    pairs_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, counter_ptr = plan
    out_ptr, row_scale_ptr, weight_scale_ptr, bias_ptr, router_weight_ptr = result
    # Eight columns a thread, so that a thread's stores are 16 bytes wide and a row's are 128 bytes in one piece.
    LAYOUT: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 4], [0, 1])
    at = offset + gl.arange(0, values.shape[1], gl.SliceLayout(0, LAYOUT))
    cols = col + gl.arange(0, HALF, gl.SliceLayout(1, LAYOUT))
    target = first + gl.minimum(at, rows - 1)
    if not GATED:
        target = gl.load(pairs_ptr + target)
    out_ptrs = out_ptr + (target.to(gl.int64) * total_cols)[None, :] + cols[:, None]
    values = gl.convert_layout(values.to(out_ptr.dtype.element_ty), LAYOUT)
    gl.store(out_ptrs, values, mask=(at < rows)[None, :] & (cols < N)[:, None])


@gluon.jit
def _finish(
    lower, upper, row_scale, offset, block, plan, N, result, limits, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    PER_CHANNEL: gl.constexpr, RAW_SUMS: gl.constexpr,
):  # fmt: skip
    expert, first, rows, col_block = block
    limit, alpha = limits
    col = col_block * (HALF if GATED else 2 * HALF)
    if RAW_SUMS:
        total_cols = 2 * N if GATED else N
        _put(lower, offset, block, col, N, total_cols, plan, result, GATED)
        _put(upper, offset, block, col + (N if GATED else HALF), total_cols, total_cols, plan, result, GATED)
    elif GATED:
        gate = _dequantized(lower, row_scale, block, col, N, 2 * N, result, PER_CHANNEL)
        up = _dequantized(upper, row_scale, block, col + N, 2 * N, 2 * N, result, PER_CHANNEL)
        _put(_activate(gate, up, limit, alpha, ACTIVATION), offset, block, col, N, N, plan, result, GATED)
    else:
        y = _dequantized(lower, row_scale, block, col, N, N, result, PER_CHANNEL)
        _put(y, offset, block, col, N, N, plan, result, GATED)
        y = _dequantized(upper, row_scale, block, col + HALF, N, N, result, PER_CHANNEL)
        _put(y, offset, block, col + HALF, N, N, plan, result, GATED)


@gluon.jit
def _tile(
    ring, number, block, plan, sizes, result, limits, WHO: gl.constexpr, GATED: gl.constexpr,
    ACTIVATION: gl.constexpr, PER_CHANNEL: gl.constexpr, RAW_SUMS: gl.constexpr, BLOCK_M: gl.constexpr,
    ROWS: gl.constexpr, TAIL: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    row_blocks, col_blocks, D, N = sizes
    # Read before the turn comes.
    row_scale = _row_scale(0, block, plan, result, ROWS)
    steps = gl.cdiv(D, BLOCK_D)
    if TAIL:
        tail_scale = _row_scale(ROWS, block, plan, result, TAIL)
        lower, upper, tail_lower, tail_upper = _sums(ring, number, steps, WHO, BLOCK_M, ROWS, TAIL, STAGES)
        _finish(
            tail_lower, tail_upper, tail_scale, ROWS, block, plan, N, result, limits, GATED, ACTIVATION, PER_CHANNEL,
            RAW_SUMS,
        )  # fmt: skip
    else:
        lower, upper = _sums(ring, number, steps, WHO, BLOCK_M, ROWS, TAIL, STAGES)
    _finish(lower, upper, row_scale, 0, block, plan, N, result, limits, GATED, ACTIVATION, PER_CHANNEL, RAW_SUMS)


@gluon.jit
def _tile_without_tail(
    ring, number, block, plan, sizes, result, limits, WHO: gl.constexpr, GATED: gl.constexpr,
    ACTIVATION: gl.constexpr, PER_CHANNEL: gl.constexpr, RAW_SUMS: gl.constexpr, BLOCK_M: gl.constexpr,
    SMALL_M: gl.constexpr, BLOCK_D: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    expert, first, rows, col_block = block
    if SMALL_M:
        if rows <= SMALL_M:
            _tile(
                ring, number, block, plan, sizes, result, limits, WHO, GATED, ACTIVATION, PER_CHANNEL, RAW_SUMS,
                BLOCK_M, SMALL_M, 0, BLOCK_D, STAGES,
            )  # fmt: skip
        else:
            _tile(
                ring, number, block, plan, sizes, result, limits, WHO, GATED, ACTIVATION, PER_CHANNEL, RAW_SUMS,
                BLOCK_M, BLOCK_M, 0, BLOCK_D, STAGES,
            )  # fmt: skip
    else:
        _tile(
            ring, number, block, plan, sizes, result, limits, WHO, GATED, ACTIVATION, PER_CHANNEL, RAW_SUMS, BLOCK_M,
            BLOCK_M, 0, BLOCK_D, STAGES,
        )  # fmt: skip


@gluon.jit
def _multiply(
    ring, slots, plan, sizes, result, limits, WHO: gl.constexpr, GATED: gl.constexpr, ACTIVATION: gl.constexpr,
    PER_CHANNEL: gl.constexpr, RAW_SUMS: gl.constexpr, BLOCK_M: gl.constexpr, TAIL_M: gl.constexpr,
    SMALL_M: gl.constexpr, BLOCK_D: gl.constexpr, GROUP_M: gl.constexpr, STAGES: gl.constexpr, SLOTS: gl.constexpr,
):  # fmt: skip
    """Four warps: every second tile of the program, its sums and what follows."""
    number = 0 + WHO
    tile = _told(slots, number, SLOTS)
    while tile >= 0:
        block = _block_of(tile, plan, sizes, GROUP_M)
        expert, first, rows, col_block = block
        if TAIL_M:
            if rows > BLOCK_M:
                _tile(
                    ring, number, block, plan, sizes, result, limits, WHO, GATED, ACTIVATION, PER_CHANNEL, RAW_SUMS,
                    BLOCK_M, BLOCK_M, TAIL_M, BLOCK_D, STAGES,
                )  # fmt: skip
            else:
                _tile_without_tail(
                    ring, number, block, plan, sizes, result, limits, WHO, GATED, ACTIVATION, PER_CHANNEL, RAW_SUMS,
                    BLOCK_M, SMALL_M, BLOCK_D, STAGES,
                )  # fmt: skip
        else:
            _tile_without_tail(
                ring, number, block, plan, sizes, result, limits, WHO, GATED, ACTIVATION, PER_CHANNEL, RAW_SUMS,
                BLOCK_M, SMALL_M, BLOCK_D, STAGES,
            )  # fmt: skip
        number += 2
        tile = _told(slots, number, SLOTS)


@gluon.jit
def specialized_product_kernel(
    codes_desc,  # descriptor of i8 [rows, D] in sorted order, for BLOCK_M rows
    tail_desc,  # the same for TAIL_M rows, or None
    row_scale_ptr,  # f32 [rows]
    weight_desc,  # descriptor of i8 [E * N, D] for HALF rows; for GATED [E * 2N, D]: N gate rows, then N up rows
    weight_scale_ptr,  # f32 [E, N], [E, 2N] or [E]
    bias_ptr,  # float [E, N] or [E, 2N], or None
    router_weight_ptr,  # f32 [P] or None; for GATED
    out_ptr,  # float [P, N], i32 for RAW_SUMS; for GATED in sorted order (i32 [P, 2N]), otherwise in that of pairs
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
    BLOCK_M: gl.constexpr,
    TAIL_M: gl.constexpr,
    SMALL_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
    GROUP_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    SLOTS: gl.constexpr = STAGES + 2
    LAYOUT: gl.constexpr = weight_desc.layout
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    weights = gl.allocate_shared_memory(gl.int8, [2 * STAGES, HALF, BLOCK_D], LAYOUT)
    rows_main = gl.allocate_shared_memory(gl.int8, [STAGES, BLOCK_M, BLOCK_D], LAYOUT)
    if TAIL_M:
        rows_tail = gl.allocate_shared_memory(gl.int8, [STAGES, TAIL_M, BLOCK_D], LAYOUT)
    else:
        rows_tail: gl.constexpr = None
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    turn = gl.allocate_shared_memory(gl.int64, [2, 1], BARRIER)
    told = gl.allocate_shared_memory(gl.int64, [SLOTS, 1], BARRIER)
    tiles = gl.allocate_shared_memory(gl.int32, [SLOTS, 1], gl.SwizzledSharedLayout(1, 1, 1, [0]))
    for i in gl.static_range(STAGES):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=1)
    for i in gl.static_range(2):
        mbarrier.init(turn.index(i), count=1)
    for i in gl.static_range(SLOTS):
        mbarrier.init(told.index(i), count=1)
    fence_async_shared()
    _wait(DEPENDENT)
    _trigger(DEPENDENT)

    ring = (weights, rows_main, rows_tail, full, empty, turn)
    slots = (tiles, told)
    plan = (pairs_ptr, block_expert_ptr, block_first_ptr, block_rows_ptr, totals_ptr + 2)
    sizes = (gl.load(totals_ptr), gl.cdiv(N, HALF if GATED else 2 * HALF), D, N)
    result = (out_ptr, row_scale_ptr, weight_scale_ptr, bias_ptr, router_weight_ptr)
    # A processor has registers for 168 a thread of these twelve warps; the one that brings needs next to none.
    gl.warp_specialize(
        [
            (
                _multiply,
                (
                    ring, slots, plan, sizes, result, (limit, alpha), 0, GATED, ACTIVATION, PER_CHANNEL, RAW_SUMS,
                    BLOCK_M, TAIL_M, SMALL_M, BLOCK_D, GROUP_M, STAGES, SLOTS,
                ),
            ),
            (
                _multiply,
                (
                    ring, slots, plan, sizes, result, (limit, alpha), 1, GATED, ACTIVATION, PER_CHANNEL, RAW_SUMS,
                    BLOCK_M, TAIL_M, SMALL_M, BLOCK_D, GROUP_M, STAGES, SLOTS,
                ),
            ),
            (
                _bring,
                (
                    ring, slots, (weight_desc, codes_desc, tail_desc), plan, sizes, GATED, BLOCK_M, TAIL_M, BLOCK_D,
                    GROUP_M, STAGES, SLOTS,
                ),
            ),
        ],
        [4, 1],
        [232, 40],
    )  # fmt: skip
