"""The time of a program's GPU kernels, matrix products apart from all others, from torch's profiler."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from typing import Any, Final

import torch

PRODUCTS: Final = re.compile(r"gemm|nvjet|cutlass|flash|fmha|attention|grouped_product|specialized_product|gemv", re.I)
"""Names of kernels that multiply matrices: cuBLAS, CUTLASS (grouped products), attention, and quarkconv's own."""
COPIES: Final = re.compile(r"^Mem(cpy|set)")


def kernel_time(run: Callable[[], object], largest: int = 12) -> dict[str, Any]:
    """Run a program and sum its kernels.

    Returns:
        seconds of ``products``, ``others`` and ``copies``, and the ``largest`` of each of the first two by name.
    """
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        run()
        torch.cuda.synchronize()
    seconds: Counter[str] = Counter()
    for event in profile.profiler.kineto_results.events():  # type: ignore[union-attr]
        if event.device_type() == torch.autograd.DeviceType.CUDA:
            seconds[event.name()] += event.duration_ns() / 1e9
    kinds: dict[str, Counter[str]] = {"products": Counter(), "others": Counter(), "copies": Counter()}
    for name, value in seconds.items():
        kind = "copies" if COPIES.match(name) else "products" if PRODUCTS.search(name) else "others"
        kinds[kind][name] = value
    return {
        **{kind: sum(found.values()) for kind, found in kinds.items()},
        "largest": {
            kind: [[name[:120], value] for name, value in kinds[kind].most_common(largest)]
            for kind in ("products", "others")
        },
    }
