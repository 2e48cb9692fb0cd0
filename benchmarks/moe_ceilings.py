"""The clock of benchmarks/moe_int8.py, and by that clock what the GPU reads and multiplies at most."""

import functools

import torch
import triton
import triton.language as tl

from quarkconv.kernels.tune import time_calls

WARM_UP = 0.05  # seconds
time_graph = functools.partial(time_calls, warm_up=WARM_UP)


@triton.jit
def _read_kernel(source, result, size, BLOCK: tl.constexpr, STEPS: tl.constexpr):
    total = tl.zeros([BLOCK], tl.int32)
    for step in range(STEPS):
        offsets = (tl.program_id(0).to(tl.int64) * STEPS + step) * BLOCK + tl.arange(0, BLOCK)
        total += tl.load(source + offsets, mask=offsets < size, other=0)
    tl.atomic_add(result, tl.sum(total))


@triton.jit
def _dense_kernel(a, b, c, N, BLOCK: tl.constexpr, GROUP: tl.constexpr):
    across = N // BLOCK
    group = tl.program_id(0) // (GROUP * across)
    row = group * GROUP + tl.program_id(0) % GROUP
    col = (tl.program_id(0) % (GROUP * across)) // GROUP
    rows, cols, depth = row * BLOCK + tl.arange(0, BLOCK), col * BLOCK + tl.arange(0, BLOCK), tl.arange(0, BLOCK)
    a_ptrs, b_ptrs = a + rows[:, None] * N + depth[None, :], b + cols[None, :] * N + depth[:, None]
    sums = tl.zeros([BLOCK, BLOCK], tl.int32)
    for _ in range(0, N, BLOCK):
        sums = tl.dot(tl.load(a_ptrs), tl.load(b_ptrs), acc=sums, out_dtype=tl.int32)
        a_ptrs += BLOCK
        b_ptrs += BLOCK
    tl.store(c + rows[:, None] * N + cols[None, :], (sums.to(tl.float32) * 1e-4).to(tl.bfloat16))


def measure_ceilings() -> dict[str, float]:
    """Bytes read and int8 operations a second, replayed as long as the forwards: at the power limit both are lower."""
    source = torch.randint(-(2**31), 2**31 - 1, (1 << 30,), dtype=torch.int32, device="cuda")
    result = torch.zeros(1, dtype=torch.int32, device="cuda")

    def read(block: int, steps: int) -> None:
        grid = (triton.cdiv(source.numel(), block * steps),)
        _read_kernel[grid](source, result, source.numel(), BLOCK=block, STEPS=steps, num_warps=4 if block < 4096 else 8)

    sizes = ((1024, 8), (2048, 8), (2048, 4), (4096, 4))
    reads = [time_graph([lambda block=block, steps=steps: read(block, steps)]) for block, steps in sizes]
    n = 8192
    a, b = (torch.randint(-127, 128, (n, n), dtype=torch.int8, device="cuda") for _ in range(2))
    c = torch.empty((n, n), dtype=torch.bfloat16, device="cuda")
    dense = time_graph([lambda: _dense_kernel[((n // 128) ** 2,)](a, b, c, n, BLOCK=128, GROUP=8, num_warps=4)])
    return {"read_bytes_per_s": 4 * (1 << 30) / min(reads) * 1e6, "int8_ops_per_s": 2 * n**3 / dense * 1e6}
