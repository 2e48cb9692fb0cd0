# mypy: ignore-errors
"""Programmatic dependent launch: a kernel's programs may be placed while the kernel before it still runs.

The hardware (NVIDIA, compute capability 9.0 and above) then overlaps the end of one launch with the start of the next.
Everywhere else DEPENDENT is false, these functions are empty, and a launch begins when the one before it has ended.

    _trigger   lets the next launch place its programs, once every program of this one has called it
    _wait      returns when the launch before this one is complete and what it wrote can be read

Every program of every kernel waits before it reads what an earlier launch wrote, and before it writes or ends. So when
a kernel passes its wait, not only the launch before it is complete, but all earlier ones. What may be read before the
wait is what was complete before any program of this launch could start: what the caller passed in, if the launch
before this one triggered after its own wait, and the weights.
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
