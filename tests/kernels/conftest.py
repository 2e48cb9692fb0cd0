"""Fixtures of the kernel tests: with a GPU the kernels run compiled on it, without one in Triton's interpreter."""

import functools
import importlib
import inspect
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

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


def _list_the_language_once() -> None:
    """Whenever a jitted function calls another, Triton's interpreter lists the members of its language to replace those
    that are built in, which they are no longer; and it makes a table of dtypes for each operation. Listing them once,
    and looking dtypes up once, saves a third of the time of these tests."""
    from triton.runtime import interpreter  # imported late: see above

    language = interpreter.tl
    is_built_in = language.core.is_builtin
    numpy_dtype = interpreter._get_np_dtype

    @functools.cache
    def built_in(package: Any) -> list[str]:
        return [name for name, member in inspect.getmembers(package) if is_built_in(member)]

    def replace_built_in(package: Any, builder: Any, scope: Any) -> None:
        names = built_in(package)
        if not is_built_in(getattr(package, names[-1])):  # all of them are replaced at the same time
            return
        for name in names:
            member = getattr(package, name)
            if is_built_in(member):
                interpreter._patch_attr(package, name, member, builder, scope)

    @functools.cache
    def dtype_of_elements(element: Any) -> Any:
        return numpy_dtype(element)

    def cached_numpy_dtype(found: Any) -> Any:
        return numpy_dtype(found) if found.scalar.is_ptr() else dtype_of_elements(found.scalar)

    for package in (language, language.core, language.math, language.tensor, language.core.tensor_descriptor_base):
        built_in(package)
    interpreter._patch_builtin = replace_built_in
    interpreter._get_np_dtype = cached_numpy_dtype


if not HAS_GPU:
    _import_kernels_for_the_interpreter()
    _list_the_language_once()


@pytest.fixture(autouse=True)
def _interpreter(monkeypatch: pytest.MonkeyPatch) -> None:
    """CPU tensors get the interpreted kernels in this folder."""
    if not HAS_GPU:
        monkeypatch.setenv("TRITON_INTERPRET", "1")


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
