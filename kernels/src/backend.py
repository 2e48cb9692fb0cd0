"""Which implementation a tensor gets, and what the device it lives on can hold."""

import contextlib
import functools
import importlib.metadata
import importlib.util
import os
from dataclasses import dataclass
from typing import Literal

import torch

Platform = Literal["cuda", "hip", "xpu", "interpreter"]

GLUON_TESTED = ("3.6", "3.7", "3.9")
"""Releases of Triton whose Gluon ran the kernels on a GPU. Gluon is experimental and changes between releases, and a
kernel that compiles with an untested one may still be wrong."""

LAUNCHER_KNOWN = ("3.6", "3.7", "3.8", "3.9")
"""Releases of Triton whose launcher of compiled kernels takes what `launch.prepared` gives it on NVIDIA, by its source.
On AMD and Intel, and with other releases, Triton binds the arguments of every launch."""

_TRITON_DEVICES = ("cuda", "xpu")  # torch calls AMD devices "cuda" too
_TRUE_STRINGS = ("1", "true", "on", "y", "yes")  # the spellings that Triton takes for TRITON_INTERPRET


@dataclass(frozen=True, slots=True)
class DeviceTraits:
    """Properties of a device that decide launch options.

    shared_memory       the most bytes of shared memory (LDS) that one program may hold
    tensor_descriptors  whether TMA can copy tiles by a descriptor of the tensor
    dependent_launch    whether a launch may begin while the one before it ends; see `jit.dependent`
    warp_specialization whether warps of a program can be specialized (Gluon, on NVIDIA's Hopper)
    processors          number of SMs; 0 if unknown
    dot4                whether NVIDIA's dp4a multiplies and sums four codes in an int32
    name                the device's name, which selects its table of launch options
    wgmma               whether matrix instructions read their operands from shared memory, not from registers
    int8_matrix         whether Triton has int8 matrix instructions for it: not for NVIDIA before sm_80
    warp_size           threads of a warp (of a wave on AMD)
    direct_launch       whether compiled kernels can be launched without Triton's binding; see `launch.prepared`
    """

    platform: Platform
    shared_memory: int
    tensor_descriptors: bool = False
    dependent_launch: bool = False
    warp_specialization: bool = False
    processors: int = 0
    dot4: bool = False
    name: str = ""
    wgmma: bool = False
    int8_matrix: bool = True
    warp_size: int = 32
    direct_launch: bool = False

    @property
    def mma_sync(self) -> bool:
        """NVIDIA's matrix instructions with operands in registers."""
        return self.platform == "cuda" and not self.wgmma

    @property
    def rdna(self) -> bool:
        """AMD's Radeon: waves of 32, and 256 registers a lane."""
        return self.platform == "hip" and self.warp_size == 32


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


def _triton_has(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:
        return False


def _triton_is(versions: tuple[str, ...]) -> bool:
    try:
        found = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        return False
    return found.startswith(tuple(f"{version}." for version in versions))


def dependence(device: torch.device) -> dict[str, bool]:
    """The arguments of a launch that say whether it may begin while the one before it ends."""
    if device_traits(device).dependent_launch:
        return {"DEPENDENT": True, "launch_pdl": True}
    return {"DEPENDENT": False}


@functools.cache
def device_traits(device: torch.device) -> DeviceTraits:
    """The traits of `device`; cached, since asking the driver costs more than a launch."""
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        shared = getattr(properties, "shared_memory_per_block_optin", 0) or 64 * 1024
        if torch.version.hip:
            return DeviceTraits("hip", shared, name=properties.name, warp_size=getattr(properties, "warp_size", 64))
        hopper = properties.major >= 9
        return DeviceTraits(
            "cuda",
            shared,
            tensor_descriptors=hopper and _triton_has("triton.tools.tensor_descriptor"),
            dependent_launch=hopper and _triton_has("triton.language.extra.cuda.gdc"),
            warp_specialization=properties.major == 9 and _triton_is(GLUON_TESTED),
            processors=properties.multi_processor_count,
            dot4=True,
            name=properties.name,
            wgmma=properties.major == 9,
            int8_matrix=properties.major >= 8,
            direct_launch=_triton_is(LAUNCHER_KNOWN),
        )
    if device.type == "xpu":
        return DeviceTraits("xpu", 128 * 1024)
    return DeviceTraits("interpreter", 1 << 30)
