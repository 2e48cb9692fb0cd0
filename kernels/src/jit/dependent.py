# mypy: ignore-errors
"""Programmatic dependent launch: programs of a kernel start while the kernel before it still runs.

The hardware (NVIDIA, compute capability 9.0 and above) then overlaps the end of one launch with the start of the next.
Everywhere else DEPENDENT is false, these functions are empty, and a launch begins when the one before it has ended.

    _trigger   allows the next launch to start, once every program of this one has called it
    _wait      returns when the launch before this one is complete and its writes are visible

Every program of every kernel waits before it reads results of an earlier launch, and before it writes or ends. So when
a kernel passes its wait, all earlier launches are complete. Before the wait, a program may read the weights, and the
caller's inputs if the launch before this one triggered after its own wait.
"""

import triton
import triton.language as tl

try:
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait
except ImportError:  # an older Triton, which cannot launch this way either
    gdc_launch_dependents = gdc_wait = None


@triton.jit
def _wait(DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_wait()


@triton.jit
def _trigger(DEPENDENT: tl.constexpr):
    if DEPENDENT:
        gdc_launch_dependents()
