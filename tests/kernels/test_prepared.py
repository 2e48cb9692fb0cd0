"""Repeated forwards: what they launch is what Triton would launch, and on a GPU they give the same bits."""

import inspect
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from quarkconv.kernels import forward, fused_experts_int8
from quarkconv.kernels.arguments import check_arguments
from quarkconv.kernels.launch.prepared import PreparedLaunches, allocate

RULES = (
    "a second call is repeated",
    "a launch hook gets every launch from Triton",
    "without it a call is repeated again",
    "debug compiles other kernels",
    "instrumentation_mode compiles other kernels",
    "a call of the first mode is repeated",
    "a wrong call like a right one is refused",
    "an unknown address is not repeated",
    "a workspace at 4 bytes from a multiple of 16 is not repeated",
    "the oldest key makes room",
)


@pytest.fixture(scope="module")
def comparison() -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, str(Path(__file__).with_name("repeat_launches.py")), "1"]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_repeated_forward_launches_what_triton_would(comparison: subprocess.CompletedProcess[str]) -> None:
    lines = comparison.stdout.splitlines()
    assert comparison.returncode == 0, comparison.stdout[-4000:] + comparison.stderr
    assert not [line for line in lines if line.startswith("different")]
    repeated, others = (int(word) for word in lines[-1].replace(",", "").split() if word.isdigit())
    assert repeated > 1000
    assert others > 500


@pytest.mark.parametrize("rule", RULES)
def test_what_is_repeated(rule: str, comparison: subprocess.CompletedProcess[str]) -> None:
    assert comparison.stdout.splitlines().count(f"holds: {rule}") == 2


def test_the_key_has_every_argument() -> None:
    assert inspect.signature(forward._split).parameters == inspect.signature(check_arguments).parameters
    arguments = {name: object() for name in inspect.signature(check_arguments).parameters}
    tensors, others = forward._split(**arguments)  # type: ignore[arg-type]
    assert {id(value) for value in (*tensors, *others)} == {id(value) for value in arguments.values()}
    assert tensors[0] is arguments["hidden_states"]
    assert tensors[-1] is arguments["out"]


def test_buffers_are_aligned_and_apart() -> None:
    shapes = [((3, 5), torch.int8), ((7,), torch.float32), ((64,), torch.int32), ((2, 3), torch.bfloat16)]
    buffers = allocate(shapes, torch.device("cpu"))
    assert [(tuple(buffer.shape), buffer.dtype) for buffer in buffers] == shapes
    starts = [buffer.data_ptr() - buffers[0].data_ptr() for buffer in buffers]
    assert starts == [0, 256, 512, 768]


def test_a_workspace_past_2_gib_is_several_allocations() -> None:
    buffers = allocate([((2**30,), torch.int8), ((2**29,), torch.bfloat16)], torch.device("meta"))
    assert [buffer.untyped_storage().nbytes() for buffer in buffers] == [2**30, 2**30]


@pytest.fixture
def repeated(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each prepared forward was repeated."""
    runs: list[bool] = []
    run = PreparedLaunches.run

    def listing(self: PreparedLaunches, addresses: list[int | None]) -> bool:
        runs.append(run(self, addresses))
        return runs[-1]

    monkeypatch.setattr(PreparedLaunches, "run", listing)
    monkeypatch.setattr(forward, "_PREPARED", {})
    return runs


def usual(case: Any, **options: Any) -> torch.Tensor:
    return forward.run_checked(check_arguments(*case.tensors(), **options))


# M, H, I, E, K: GEMV, few rows, many rows with specialized warps, sizes that are not multiples of 16
SIZES = {
    "one token": (1, 512, 256, 16, 4),
    "few rows": (24, 512, 256, 16, 4),
    "many rows": (400, 1024, 512, 8, 2),
    "odd": (77, 264, 100, 6, 3),
}


@pytest.mark.gpu
@pytest.mark.parametrize("sizes", SIZES.values(), ids=SIZES)
@pytest.mark.parametrize("kind", ["plain", "unaligned", "static", "bias", "other ranks"])
def test_a_repeated_launch_gives_the_same_bits(
    sizes: Any, kind: str, make_case: Callable[..., Any], repeated: list[bool]
) -> None:
    options: dict[str, Any] = {}
    for seed in range(3):
        case = make_case(*sizes, seed=seed)
        _, hidden, intermediate, experts, _ = sizes
        if kind == "unaligned":
            flat = torch.empty(case.hidden_states.numel() + 1, dtype=torch.bfloat16, device="cuda")[1:]
            case = case.replace(hidden_states=flat.view(case.hidden_states.shape).copy_(case.hidden_states))
        if kind == "static":
            scales = (torch.linspace(low, 0.04, experts, device="cuda") for low in (0.02, 0.03))
            options = dict(zip(("w13_input_scale", "w2_input_scale"), scales, strict=True))
        if kind == "bias":
            columns = (("w13_bias", 2 * intermediate), ("w2_bias", hidden))
            options = {name: torch.randn(experts, count, device="cuda") for name, count in columns}
        if kind == "other ranks":
            case.topk_ids[:, 0] = -1
        assert torch.equal(fused_experts_int8(*case.tensors(), **options), usual(case, **options))
    assert repeated == [True, True]


@pytest.mark.gpu
def test_a_graph_captures_repeated_launches(make_case: Callable[..., Any], repeated: list[bool]) -> None:
    case, other = (make_case(*SIZES["many rows"], seed=seed) for seed in (0, 1))
    expected = usual(other)
    out = fused_experts_int8(*case.tensors())
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fused_experts_int8(*case.tensors(), out=out)
    assert repeated == [True]
    for tensor, other_tensor in zip(case.tensors(), other.tensors(), strict=True):
        tensor.copy_(other_tensor)
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.gpu
def test_threads_with_streams_share_prepared_launches(make_case: Callable[..., Any]) -> None:
    cases = [make_case(*SIZES["many rows"], seed=seed) for seed in range(4)]
    expected = [usual(case) for case in cases]
    torch.cuda.synchronize()
    differences: list[int] = []

    def run(number: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            found = [fused_experts_int8(*cases[number].tensors()) for _ in range(20)]
        stream.synchronize()
        differences.extend(number for each in found if not torch.equal(each, expected[number]))

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert differences == []
