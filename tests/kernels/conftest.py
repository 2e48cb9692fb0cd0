"""Fixtures of the kernel tests: with a GPU the kernels run compiled on it, without one in Triton's interpreter."""

import importlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from support.interpreter import prepare_interpreter, widen_vector_tiles

HAS_GPU = torch.cuda.is_available()
JIT_MODULES = ("cast", "combine", "dependent", "epilogue", "grouped_gemm", "grouped_gemv", "quantize", "routing")


def _import_kernels_for_the_interpreter() -> None:
    """Triton decides when a function is decorated. The variable is set for that long only: the rest of the suite
    keeps the torch path on CPU tensors."""
    before = os.environ.get("TRITON_INTERPRET")
    os.environ["TRITON_INTERPRET"] = "1"
    for name in JIT_MODULES:
        importlib.import_module(f"quarkconv.kernels.jit.{name}")
    if before is None:
        del os.environ["TRITON_INTERPRET"]
    else:
        os.environ["TRITON_INTERPRET"] = before


if not HAS_GPU:
    _import_kernels_for_the_interpreter()
    prepare_interpreter()


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors get the interpreted kernels in this folder."""
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")
        widen_vector_tiles(monkeypatch.setattr)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not HAS_GPU:
            item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is false"))


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if HAS_GPU else "cpu")


@dataclass(frozen=True, slots=True)
class Case:
    """Arguments of one forward; `replace` it to change some."""

    hidden_states: torch.Tensor
    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor
    topk_weights: torch.Tensor
    topk_ids: torch.Tensor

    def tensors(self) -> tuple[torch.Tensor, ...]:
        return (
            self.hidden_states,
            self.w13,
            self.w2,
            self.w13_scale,
            self.w2_scale,
            self.topk_weights,
            self.topk_ids,
        )

    def replace(self, **changes: Any) -> "Case":
        return replace(self, **changes)


@pytest.fixture
def make_case(device: torch.device) -> Callable[..., Case]:
    """make_case(M, H, I, E, K, ...): random codes over the whole int8 range, distinct random experts per token."""

    def make(
        tokens: int,
        hidden: int,
        intermediate: int,
        experts: int,
        top_k: int,
        *,
        dtype: torch.dtype = torch.bfloat16,
        ids_dtype: torch.dtype = torch.int32,
        seed: int = 0,
    ) -> Case:
        g = torch.Generator(device=device).manual_seed(seed)

        def codes(*shape: int) -> torch.Tensor:
            return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8, device=device)

        def uniform(*shape: int) -> torch.Tensor:
            return torch.rand(shape, generator=g, device=device)

        logits = torch.randn(tokens, experts, generator=g, device=device)
        weights, ids = torch.softmax(logits, -1).topk(top_k, -1)
        return Case(
            hidden_states=torch.randn(tokens, hidden, generator=g, device=device).to(dtype),
            w13=codes(experts, 2 * intermediate, hidden),
            w2=codes(experts, hidden, intermediate),
            # A standard normal token gives gate and up values of about 1, where the activations bend.
            w13_scale=(0.5 + uniform(experts, 2 * intermediate, 1)) / (74 * hidden**0.5),
            w2_scale=(0.5 + uniform(experts, hidden, 1)) / (74 * intermediate**0.5),
            topk_weights=weights.contiguous(),
            topk_ids=ids.to(ids_dtype).contiguous(),
        )

    return make
