"""Compare repeated forwards, launch by launch, with what Triton would launch: python repeat_launches.py SEED...

A program of its own: it needs Triton without TRITON_INTERPRET. There is no GPU, and nothing is compiled: Triton binds
and specializes the arguments of every launch, and a stand-in for its compiler gives a kernel for each key it finds.
Forwards with random sizes, layouts, addresses and options, and neighbours of each that differ in one thing, run twice:
by `run_forward`, and by `run_checked`. The launches of both must be the same in kernel, key, grid and arguments, where
addresses in a workspace count from its start.

It prints a line a difference, and at last how many forwards were repeated and how many were not.
"""

import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

import quarkconv.kernels
from quarkconv.kernels import forward
from quarkconv.kernels.arguments import check_arguments
from quarkconv.kernels.backend import DeviceTraits
from quarkconv.kernels.launch import prepared, specialized  # noqa: F401  (their names are replaced below)

TRAITS = {
    "hopper": DeviceTraits(
        "cuda", 232448, True, True, True, 132, dot4=True, name="NVIDIA H200", wgmma=True, direct_launch=True
    ),
    "ampere": DeviceTraits("cuda", 101376, dot4=True, direct_launch=True),
}
BASES = 10  # calls of a seed, beside their neighbours
TOKENS = (1, 2, 3, 5, 8, 15, 16, 17, 33, 64, 100, 128, 129, 200, 256, 300, 512)
SIZES = ((8, 2, 256, 128), (16, 4, 264, 136), (32, 8, 128, 512), (6, 1, 100, 60), (300, 8, 64, 64))  # E, K, H, I


@dataclass
class Log:
    """The launches of one forward, and its workspaces."""

    launches: list[tuple[Any, ...]] = field(default_factory=list)
    workspaces: list[torch.Tensor] = field(default_factory=list)
    hooks: int = 0
    shift: int = 0  # bytes from a multiple of 16 to where workspaces begin

    def normal(self, out: torch.Tensor) -> list[tuple[Any, ...]]:
        """The launches with addresses as places: in the workspace, in the result, or absolute."""
        return [(key, grid, [self._place(value, out) for value in values]) for key, grid, values in self.launches]

    def _place(self, value: Any, out: torch.Tensor) -> Any:
        if hasattr(value, "block_shape"):
            sizes = (tuple(value.shape), tuple(value.strides), tuple(value.block_shape), value.padding)
            return type(value).__name__, *sizes, self._place(value.base, out)
        address = value.data_ptr() if hasattr(value, "data_ptr") else value
        if type(address) is not int:
            return value
        for workspace in self.workspaces:
            if 0 <= address - workspace.data_ptr() < workspace.numel():
                return "workspace", address - workspace.data_ptr()
        return "out" if address == out.data_ptr() else address


LOG = Log()


class Compiled:
    """What Triton's compiler would give for a key."""

    function, packed_metadata = 1, (4, 1, 0)

    def __init__(self, key: str) -> None:
        self.key = key

    def launch_metadata(self, *_: Any) -> None:
        return None

    def run(self, *args: Any) -> None:
        grid, (stream, function, metadata, _, enter, _), values = args[:3], args[3:9], args[9:]
        assert (stream, function, metadata) == (7, self.function, self.packed_metadata)
        LOG.launches.append((self.key, grid, values))
        LOG.hooks += len(getattr(enter, "calls", ()))


def compile_nothing(self: Any, key: str, _: Any, device: int, *__: Any) -> Compiled:
    compiled = Compiled(f"{self.fn.__name__} {key}")
    self.device_caches[device][0][key] = compiled
    return compiled


class Driver:
    """Triton's driver of a GPU that is not there."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, _: Any) -> int:
        return 7

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


def replace_names(traits: DeviceTraits) -> None:
    """CPU tensors are on a device with these traits."""
    forward._PREPARED.clear()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith(quarkconv.kernels.__name__):
            for name, value in (("device_traits", lambda _: traits), ("uses_triton", lambda _: True)):
                if hasattr(module, name):
                    setattr(module, name, value)


def tensor(shape: tuple[int, ...], dtype: torch.dtype, offset: int = 0, pitch: int = 0) -> torch.Tensor:
    """An uninitialized tensor, `offset` elements from where its allocation begins, rows `pitch` elements wider."""
    wide = (*shape[:-1], shape[-1] + pitch)
    size = torch.Size(wide).numel()
    return torch.empty(size + offset, dtype=dtype)[offset:].view(wide)[..., : shape[-1]]


def random_call(choose: random.Random) -> dict[str, Any]:
    """The arguments of a forward. Most are plain; any of them may lie where Triton compiles another kernel."""
    experts, top_k, hidden, intermediate = choose.choice(SIZES)
    tokens, dtype = choose.choice(TOKENS), choose.choice((torch.bfloat16, torch.float16))
    activation = choose.choice(
        ({}, {}, {"activation_limit": 7.0}, {"activation": "relu2"}, {"activation": "swigluoai"})
    )
    gate_up = intermediate * (1 if activation.get("activation") == "relu2" else 2)

    def offset(*others: int) -> int:
        return choose.choice(others) if choose.random() < 0.1 else 0

    def rows(count: int) -> int:
        return choose.choice((count, count, 1))

    def maybe(shape: tuple[int, ...], *dtypes: torch.dtype) -> torch.Tensor | None:
        return tensor(shape, choose.choice(dtypes), offset(1, 8)) if choose.random() < 0.25 else None

    x = tensor((tokens, hidden), dtype, offset(1, 4, 8), choose.choice((0, 0, 0, 8, 13)))
    call = {
        "hidden_states": x,
        "w13": tensor((experts, gate_up, hidden), torch.int8, offset(1, 4, 16)),
        "w2": tensor((experts, hidden, intermediate), torch.int8, offset(1, 4, 16)),
        "w13_scale": tensor((experts, rows(gate_up), 1), torch.float32, offset(1, 4)),
        "w2_scale": tensor((experts, rows(hidden), 1), torch.float32, offset(1, 4)),
        "topk_weights": tensor((tokens, top_k), torch.float32, offset(1, 4)),
        "topk_ids": tensor((tokens, top_k), choose.choice((torch.int32, torch.int64)), offset(1, 4)),
        "w13_input_scale": maybe((experts,), torch.float32),
        "w2_input_scale": maybe((experts,), torch.float32),
        "w13_bias": maybe((experts, gate_up), torch.float32, dtype),
        "w2_bias": maybe((experts, hidden), torch.float32, dtype),
        "apply_router_weight_on_input": choose.random() < 0.2,
        **activation,
    }
    if call["w13_input_scale"] is not None and choose.random() < 0.5:
        call["w2_input_scale"] = call["w13_input_scale"]
    result = choose.choice(("new", "given", "in place"))
    if result != "new":
        in_place = result == "in place" and x.is_contiguous()
        call["out"] = x if in_place else tensor((tokens, hidden), dtype, offset(1, 8))
    return call


def neighbours(call: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The call with other tensors of the same kind, and with one thing changed at a time."""
    tensors = {name: value for name, value in call.items() if isinstance(value, torch.Tensor)}
    yield {**call, **{name: value.clone() for name, value in tensors.items()}}
    for name, value in tensors.items():
        for offset in (1, 4 // value.element_size(), 16 // value.element_size()):
            yield {**call, name: tensor(tuple(value.shape), value.dtype, offset)}
    x, ids, w13_scale = call["hidden_states"], call["topk_ids"], call["w13_scale"]
    for pitch in (8, 13):
        yield {**call, "hidden_states": tensor(tuple(x.shape), x.dtype, 0, pitch)}
    yield {**call, "topk_ids": ids.to(torch.int32 if ids.dtype == torch.int64 else torch.int64)}
    rows = call["w13"].shape[1] if w13_scale.shape[1] == 1 else 1
    yield {**call, "w13_scale": tensor((len(w13_scale), rows, 1), torch.float32)}
    static, bias = (tensor(tuple(w13_scale.shape[:1]), torch.float32) for _ in range(2)), call.get("w2_bias")
    first, second = static
    for scales in ((None, None), (first, None), (None, first), (first, first), (first, second)):
        yield {**call, "w13_input_scale": scales[0], "w2_input_scale": scales[1]}
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        yield {
            **call,
            "w2_bias": None if bias is not None and bias.dtype == dtype else tensor((len(first), x.shape[1]), dtype),
        }
    other = torch.float16 if x.dtype == torch.bfloat16 else torch.bfloat16
    yield {**call, "hidden_states": x.to(other), "out": None}
    for out in (None, torch.empty_like(x, memory_format=torch.contiguous_format), x if x.is_contiguous() else None):
        yield {**call, "out": out}
    yield {**call, "apply_router_weight_on_input": not call["apply_router_weight_on_input"]}
    if call.get("activation") != "relu2":
        yield {**call, "activation": "silu", "activation_limit": 7.0 if call.get("activation_limit") is None else 8.0}
        yield {**call, "activation": "swiglustep", "activation_limit": None}
    if len(x) > 1:
        fewer = {name: call[name][:-1].clone() for name in ("hidden_states", "topk_weights", "topk_ids")}
        yield {**call, **fewer, "out": None}


def launches_of(run: Any) -> tuple[list[tuple[Any, ...]], int]:
    """(the launches of a forward, how often launch hooks were called)"""
    global LOG
    LOG = Log(shift=LOG.shift)
    out = run()
    return LOG.normal(out), LOG.hooks


@contextmanager
def listed_workspaces() -> Iterator[None]:
    """Every workspace is listed in the log."""
    empty = torch.empty

    def listing(*args: Any, **kwargs: Any) -> torch.Tensor:
        if kwargs.get("dtype") != torch.uint8:
            return empty(*args, **kwargs)
        LOG.workspaces.append(empty(args[0] + LOG.shift, dtype=torch.uint8)[LOG.shift :])
        return LOG.workspaces[-1]

    torch.empty = listing
    try:
        yield
    finally:
        torch.empty = empty


def compare(call: dict[str, Any]) -> tuple[bool, bool]:
    """(whether a forward launches what Triton would, whether it was repeated)"""
    repeated: list[bool] = []
    run = prepared.PreparedLaunches.run

    def noting(self: Any, addresses: Any) -> bool:
        repeated.append(run(self, addresses))
        return repeated[-1]

    prepared.PreparedLaunches.run = noting  # type: ignore[method-assign]
    try:
        found, found_hooks = launches_of(lambda: forward.run_forward(**call))
    finally:
        prepared.PreparedLaunches.run = run  # type: ignore[method-assign]
    expected, hooks = launches_of(lambda: forward.run_checked(check_arguments(**call)))
    same = bool(expected) and found == expected and found_hooks == hooks
    if not same:
        shown = {name: getattr(value, "shape", value) for name, value in call.items()}
        differ = [(a, b) for a, b in zip(found, expected, strict=False) if a != b]
        print(f"different: {shown}: {len(found)} and {len(expected)} launches, {differ[:1]}")
    return same, any(repeated)


def others(choose: random.Random) -> Iterator[tuple[str, bool]]:
    """(a rule, whether it holds) of what is not repeated, or for how long."""
    knobs, call = triton.knobs, random_call(choose)
    compare(call)
    yield "a second call is repeated", compare(call) == (True, True)
    listener = lambda *_: None  # noqa: E731
    knobs.runtime.launch_enter_hook.add(listener)
    yield "a launch hook gets every launch from Triton", compare(call) == (True, False)
    knobs.runtime.launch_enter_hook.remove(listener)
    yield "without it a call is repeated again", compare(call) == (True, True)
    for owner, name, value in ((knobs.runtime, "debug", True), (knobs.compilation, "instrumentation_mode", "x")):
        before = getattr(owner, name)
        setattr(owner, name, value)
        yield f"{name} compiles other kernels", compare(call) == (True, False)
        setattr(owner, name, before)
    yield "a call of the first mode is repeated", compare(call) == (True, True)
    wrong = {**call, "w2": call["w2"].to(torch.int16)}
    try:
        forward.run_forward(**wrong)
        yield "a wrong call like a right one is refused", False
    except TypeError:
        yield "a wrong call like a right one is refused", True
    with prepared.record() as recording:
        forward.run_checked(check_arguments(**call))
    unknown = dict(call, topk_ids=call["topk_ids"].clone())
    inputs = forward._split(**unknown)[0]
    try:
        prepared.PreparedLaunches(recording, inputs)
        yield "an unknown address is not repeated", False
    except ValueError:
        yield "an unknown address is not repeated", True
    LOG.shift = 4
    yield "a workspace at 4 bytes from a multiple of 16 is not repeated", compare(call) == (True, False)
    LOG.shift = 0
    kept = len(forward._PREPARED)
    forward._MOST = kept
    while compare(random_call(choose))[1]:
        pass
    yield "the oldest key makes room", len(forward._PREPARED) == kept


def main(seeds: list[int]) -> int:
    JITFunction._do_compile = compile_nothing
    driver.set_active(Driver())
    wrong, counts = 0, {True: 0, False: 0}
    with listed_workspaces():
        for traits in TRAITS.values():
            replace_names(traits)
            for seed in seeds:
                choose = random.Random(seed)
                for _ in range(BASES):
                    call = random_call(choose)
                    for each in (call, *neighbours(call), call, *neighbours(call)):
                        same, repeated = compare(each)
                        wrong += not same
                        counts[repeated] += 1
            for rule, holds in others(random.Random(seeds[0])):
                wrong += not holds
                print(f"{'holds' if holds else 'fails'}: {rule}")
    print(f"repeated {counts[True]}, not repeated {counts[False]}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main([int(seed) for seed in sys.argv[1:]]))
