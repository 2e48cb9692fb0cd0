"""Launches that are recorded once and repeated with other addresses.

`kernel[grid](...)` binds its arguments, asks each for its type, alignment and divisibility, and looks up the compiled
kernel by a text of all that: with the Python around it ten times what the launch itself costs. A forward repeats a few
forwards with other addresses. So the launches of the first one are recorded, with the kernels that Triton compiled for
them, and later ones launch these compiled kernels.

That is right for a forward that differs from the recorded one in addresses alone, and in these by multiples of 16
bytes; `forward` has the key that decides it. All else that a launch was specialized for is then equal: shapes, counts,
strides, dtypes, options. Addresses are passed as integers, which spares Triton's launcher a query of the driver each.
"""

import contextlib
import copy
import itertools
import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any

import torch

from ..backend import device_guard

_THREAD = threading.local()
_ALIGNMENT = 256  # of buffers in a workspace, as in allocations of their own
_MOST_BYTES = 2**31 - 1  # of a workspace: AMD's buffer instructions reach so far into an allocation
_SPECIALIZED = 16  # bytes: Triton compiles other kernels for addresses that are not multiples of it

Buffer = tuple[tuple[int, ...], torch.dtype]
"""shape and dtype"""


@dataclass(slots=True)
class Recording:
    """The launches and the workspaces of a forward, in order."""

    launches: list["RecordedLaunch"] = field(default_factory=list)
    workspaces: list[torch.Tensor] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class RecordedLaunch:
    """A launch with its kernel, as written (`jitted`) and as compiled for its arguments."""

    jitted: Any
    compiled: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    constants: dict[str, Any]

    def values(self) -> list[Any]:
        """The values of all parameters of the kernel, in their order; options of the launch are not among them."""
        rest = self.jitted.arg_names[len(self.args) :]
        return [*self.args, *(self.constants[name] for name in rest)]

    def head(self) -> tuple[tuple[int, ...], Any, Any]:
        """The arguments of Triton's launcher before the kernel's own, beside the stream and hooks."""
        return (*self.grid, 1, 1)[:3], self.compiled.function, self.compiled.packed_metadata


def launch(jitted: Any, grid: tuple[int, ...], *args: Any, **constants: Any) -> None:
    """`jitted[grid](*args, **constants)`, recorded where `record` is active in this thread."""
    compiled = jitted[grid](*args, **constants)
    recording: Recording | None = getattr(_THREAD, "recording", None)
    if recording is not None:
        recording.launches.append(RecordedLaunch(jitted, compiled, grid, args, constants))


def allocate(buffers: Sequence[Buffer], device: torch.device) -> list[torch.Tensor]:
    """Uninitialized tensors of these shapes and dtypes, each at a multiple of 256 bytes of one allocation.

    Alignment does not depend on the sizes then, for which Triton would compile kernels anew. Beyond 2 GiB each tensor
    is an allocation of its own.
    """
    sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in buffers]
    padded = [-(-size // _ALIGNMENT) * _ALIGNMENT for size in sizes]
    if sum(padded) > _MOST_BYTES:
        return [torch.empty(shape, dtype=dtype, device=device) for shape, dtype in buffers]
    block = torch.empty(sum(padded), dtype=torch.uint8, device=device)
    recording: Recording | None = getattr(_THREAD, "recording", None)
    if recording is not None:
        recording.workspaces.append(block)
    parts = zip(block.split_with_sizes(padded), sizes, buffers, strict=True)
    return [part[:size].view(dtype).view(shape) for part, size, (shape, dtype) in parts]


@contextlib.contextmanager
def record() -> Iterator[Recording]:
    """Record the launches and workspaces of this thread."""
    _THREAD.recording = recording = Recording()
    try:
        yield recording
    finally:
        _THREAD.recording = None


class _Address:
    """What a tensor descriptor has in place of its tensor."""

    __slots__ = ("value",)

    def __init__(self, value: int) -> None:
        self.value = value

    def data_ptr(self) -> int:
        return self.value


@dataclass(frozen=True, slots=True)
class _Pool:
    """What the arguments of all launches are picked from, in this order.

    addresses    of the inputs; None for those that are not there
    offsets      of buffers in the workspace, in bytes, each with its number
    descriptors  tensor descriptors without their tensor, and the place of its address among the two above
    constants    everything else
    """

    addresses: list[int | None]
    workspace: torch.Tensor
    offsets: dict[int, int] = field(default_factory=dict)
    descriptors: list[tuple[Any, tuple[int, int]]] = field(default_factory=list)
    constants: list[Any] = field(default_factory=list)

    def add(self, value: Any) -> tuple[int, int]:
        """(which of the four, place in it) of an argument of a launch."""
        if isinstance(value, torch.Tensor):
            return self._add_address(value.data_ptr())
        if hasattr(value, "block_shape"):
            descriptor = copy.copy(value)
            descriptor.base = None
            self.descriptors.append((descriptor, self._add_address(value.base.data_ptr())))
            return 2, len(self.descriptors) - 1
        self.constants.append(value)
        return 3, len(self.constants) - 1

    def _add_address(self, address: int) -> tuple[int, int]:
        if address in self.addresses:  # the first of equal ones: which are equal does not change from call to call
            return 0, self.addresses.index(address)
        offset = address - self.workspace.data_ptr()
        if not 0 <= offset < self.workspace.numel():
            raise ValueError("expected addresses of inputs or in the workspace")
        return 1, self.offsets.setdefault(offset, len(self.offsets))

    def starts(self) -> list[int]:
        """Where each of the four begins."""
        return list(itertools.accumulate((len(self.addresses), len(self.offsets), len(self.descriptors)), initial=0))


class PreparedLaunches:
    """The launches of a recorded forward, to be repeated; threads may share it.

    Raises ValueError for a recording that cannot be repeated: nothing was compiled (in the interpreter), an address is
    neither an input's nor in the workspace, or there is more than one workspace or one of odd alignment.
    """

    def __init__(self, recording: Recording, inputs: Sequence[torch.Tensor | None]) -> None:
        from triton import knobs
        from triton.runtime import driver

        launches = recording.launches
        if not launches or len(recording.workspaces) != 1 or any(each.compiled is None for each in launches):
            raise ValueError("expected compiled launches with one workspace")
        if recording.workspaces[0].data_ptr() % _SPECIALIZED:
            raise ValueError(f"expected a workspace at a multiple of {_SPECIALIZED} bytes")
        pool = _Pool([None if each is None else each.data_ptr() for each in inputs], recording.workspaces[0])
        found = [[pool.add(value) for value in each.values()] for each in launches]
        starts = pool.starts()
        self._steps = [
            (each.compiled.run, each.head(), itemgetter(*(starts[part] + place for part, place in values)))
            for each, values in zip(launches, found, strict=True)
        ]
        self._kernels = [each.compiled for each in launches]  # their code is unloaded when they are collected
        self._bytes, self._device = pool.workspace.numel(), pool.workspace.device
        self._offsets, self._constants = list(pool.offsets), pool.constants
        self._descriptors = [(descriptor, starts[part] + place) for descriptor, (part, place) in pool.descriptors]
        self._knobs, self._driver = knobs, driver.active
        self._modes = self._current_modes()
        self._pre_run_hooks = [each.jitted.pre_run_hooks for each in launches]

    def _current_modes(self) -> tuple[Any, ...]:
        """What else decides which code Triton compiles."""
        runtime, compilation = self._knobs.runtime, self._knobs.compilation
        casts = getattr(compilation, "fpsan_homomorphic_casts", None)  # since Triton 3.9
        return runtime.debug, compilation.instrumentation_mode, casts, runtime.add_stages_inspection_hook

    def _observed(self) -> bool:
        """Whether somebody is to be called at each launch, a profiler for instance."""
        runtime = self._knobs.runtime
        enter, leave = runtime.launch_enter_hook, runtime.launch_exit_hook
        return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave) or any(self._pre_run_hooks))

    def run(self, addresses: list[int | None]) -> bool:
        """Repeat the launches on the current stream, with the addresses of other inputs.

        False, and nothing was launched, where Triton has to do it: launch hooks are set, it compiles in another mode by
        now, or the allocator's alignment is below 16 bytes.
        """
        if self._observed() or self._current_modes() != self._modes:
            return False
        workspace = torch.empty(self._bytes, dtype=torch.uint8, device=self._device)
        first = workspace.data_ptr()
        if first % _SPECIALIZED:
            return False
        pool: list[Any] = addresses + [first + offset for offset in self._offsets]
        pool += [_at(descriptor, pool[place]) for descriptor, place in self._descriptors]
        pool += self._constants
        index = self._device.index
        if self._driver.get_current_device() == index:
            self._launch(pool, self._driver.get_current_stream(index))
        else:
            with device_guard(self._device):
                self._launch(pool, self._driver.get_current_stream(index))
        return True

    def _launch(self, pool: list[Any], stream: int) -> None:
        for run, (grid, function, metadata), values in self._steps:
            run(*grid, stream, function, metadata, None, None, None, *values(pool))


def _at(descriptor: Any, address: int) -> Any:
    """The tensor descriptor with this address; its checks were passed when it was recorded."""
    found = object.__new__(type(descriptor))
    found.__dict__ = {**descriptor.__dict__, "base": _Address(address)}
    return found
