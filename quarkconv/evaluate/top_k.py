"""``torch.topk`` of routers in one kernel on a GPU: torch's own takes longer there than a norm of all hidden states."""

from __future__ import annotations

import copy
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn

from quarkconv.evaluate import layer_ops
from quarkconv.evaluate.layer_ops import MOST_CHOICES, MOST_CHOSEN, on_kernels

_FLOATS = (torch.float32, torch.bfloat16, torch.float16)


def fuse_top_k(model: nn.Module) -> None:
    """Have methods of a model's classes that call ``torch.topk`` take :func:`top_k` instead.

    A method gets a copy of its module's globals in which ``torch`` has this function: other models of the process keep
    their own.
    """
    known: dict[type[nn.Module], dict[str, FunctionType]] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in known:
            known[kind] = dict(_fused(kind))
        for name, function in known[kind].items():
            if name not in module.__dict__:
                setattr(module, name, MethodType(function, module))


def top_k(numbers: Tensor, k: int, dim: int = -1, largest: bool = True, *rest: Any, **options: Any) -> Any:
    """``torch.topk``, on the kernel where the arguments fit. Of equal numbers torch takes any, the kernel the first."""
    fits = largest and not options.keys() - {"sorted"} and dim in (-1, numbers.dim() - 1)
    if fits and on_kernels(numbers) and _fits(numbers, k):
        return torch.return_types.topk(layer_ops.largest(numbers, k))
    return torch.topk(numbers, k, dim, largest, *rest, **options)


def _fits(numbers: Tensor, k: int) -> bool:
    length = numbers.shape[-1] if numbers.dim() else 0
    fits = length <= MOST_CHOICES and 0 < k <= min(length, MOST_CHOSEN)
    return fits and numbers.dtype in _FLOATS and numbers.numel() > 0


class _Torch:
    """The module torch, but for one function."""

    topk = staticmethod(top_k)

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_TORCH = _Torch()


def _fused(kind: type[nn.Module]) -> dict[str, FunctionType]:
    """The methods of a class that call ``torch.topk``, with another ``torch``."""
    found: dict[str, FunctionType] = {}
    for owner in kind.__mro__[: kind.__mro__.index(nn.Module)]:
        for name, function in vars(owner).items():
            if name in found or not isinstance(function, FunctionType) or "topk" not in function.__code__.co_names:
                continue
            if function.__globals__.get("torch") is torch:
                namespace = {**function.__globals__, "torch": _TORCH}
                fused = FunctionType(
                    function.__code__, namespace, function.__name__, function.__defaults__, function.__closure__
                )
                fused.__kwdefaults__ = copy.copy(function.__kwdefaults__)
                found[name] = fused
    return found
