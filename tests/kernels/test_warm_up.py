"""Warming up: a forward of each kind, found from the numbers of tokens, compiles what all others launch."""

from __future__ import annotations

import pytest
import torch

from quarkconv.kernels import warm_up as module
from quarkconv.kernels.arguments import ExpertsArguments, check_arguments
from quarkconv.kernels.backend import DeviceTraits, device_traits
from quarkconv.kernels.forward import run_checked
from quarkconv.kernels.warm_up import launch_key, token_counts, warm_up

HOPPER = DeviceTraits("cuda", 227 * 1024, True, True, True, 132, dot4=True, name="NVIDIA H200", wgmma=True)
SIZES = {"in the table": (128, 8, 2048, 768), "a slice": (256, 8, 3072, 192), "not in it": (32, 4, 512, 256)}


def arguments(experts: int, top_k: int, hidden: int, intermediate: int, device: str = "cpu") -> ExpertsArguments:
    """Arguments of one token."""

    def codes(rows: int, depth: int) -> torch.Tensor:
        return torch.ones((experts, rows, depth), dtype=torch.int8, device=device)

    return check_arguments(
        torch.zeros(1, hidden, dtype=torch.bfloat16, device=device),
        codes(2 * intermediate, hidden),
        codes(hidden, intermediate),
        torch.ones(experts, 2 * intermediate, 1, device=device),
        torch.ones(experts, hidden, 1, device=device),
        torch.ones(1, top_k, device=device),
        torch.zeros(1, top_k, dtype=torch.int32, device=device),
    )


@pytest.mark.parametrize("sizes", SIZES)
def test_every_number_of_tokens_has_one_of_its_kind(monkeypatch: pytest.MonkeyPatch, sizes: str) -> None:
    monkeypatch.setattr(module, "device_traits", lambda _: HOPPER)
    call = arguments(*SIZES[sizes])
    counts = token_counts(call, 8192)
    keys = [launch_key(call, count) for count in counts]
    assert len(set(keys)) == len(counts) < 20
    assert {launch_key(call, tokens) for tokens in range(1, 8193)} == set(keys)


def test_few_tokens_need_few_forwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "device_traits", lambda _: HOPPER)
    call = arguments(*SIZES["not in it"])
    assert token_counts(call, 1) == [1]
    assert max(token_counts(call, 64)) <= 64


def test_a_cpu_compiles_nothing() -> None:
    assert warm_up(arguments(*SIZES["not in it"]), 64) == []


@pytest.mark.gpu
def test_nothing_compiles_after_it() -> None:
    from triton.knobs import runtime

    call = arguments(*SIZES["in the table"], device="cuda")
    assert warm_up(call, 4096)
    compiled: list[object] = []
    runtime.jit_post_compile_hook = lambda **event: compiled.append(event)
    try:
        for tokens in (1, 3, 8, 24, 100, 250, 333, 777, 1024, 2049, 4095):
            hidden = torch.randn(tokens, call.hidden, device="cuda").bfloat16()
            ids = torch.randint(0, call.experts, (tokens, call.top_k), device="cuda", dtype=torch.int32)
            weights = torch.rand(tokens, call.top_k, device="cuda")
            parts = (call.gate_up.codes, call.down.codes, call.gate_up.scale, call.down.scale)
            run_checked(check_arguments(hidden, *parts, weights, ids))
    finally:
        runtime.jit_post_compile_hook = None
    assert compiled == []
    assert device_traits(hidden.device).name
