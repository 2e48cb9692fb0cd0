"""Which implementation a tensor gets, and what the device it lives on can hold."""

import contextlib
import functools
import os
from dataclasses import dataclass
from typing import Literal

import torch

Platform = Literal["cuda", "hip", "xpu", "interpreter"]

_TRITON_DEVICES = ("cuda", "xpu")  # torch calls AMD devices "cuda" too
_TRUE_STRINGS = ("1", "true", "on", "y", "yes")  # the spellings that Triton takes for TRITON_INTERPRET


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """What the launch heuristics need to know about a device.

    `shared_memory` is the most bytes of shared memory (LDS) that one program may hold.
    """

    platform: Platform
    shared_memory: int


def interpreting() -> bool:
    """Whether Triton runs its kernels in its interpreter, on CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "").lower() in _TRUE_STRINGS


def uses_triton(device: torch.device) -> bool:
    """True for the Triton kernels, False for the torch path.

    GPU tensors always get the kernels. CPU tensors get them only under TRITON_INTERPRET=1, which must be set before
    Triton is first imported.
    """
    if device.type in _TRITON_DEVICES:
        return True
    if device.type == "cpu":
        return interpreting()
    raise ValueError(f"unsupported device: expected cpu, cuda (NVIDIA or AMD) or xpu, found {device}")


def device_guard(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Make `device` current: Triton launches on the current device, not on that of the tensors."""
    if device.type == "cuda":
        return torch.cuda.device(device)
    if device.type == "xpu":
        return torch.xpu.device(device)
    return contextlib.nullcontext()


@functools.cache
def device_traits(device: torch.device) -> DeviceTraits:
    """The traits of `device`; cached, since asking the driver costs more than a launch."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", 0) or 64 * 1024
        return DeviceTraits("hip" if torch.version.hip else "cuda", shared)
    if device.type == "xpu":
        return DeviceTraits("xpu", 128 * 1024)
    return DeviceTraits("interpreter", 1 << 30)
