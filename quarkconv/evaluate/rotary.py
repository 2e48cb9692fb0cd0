"""Rotary embeddings of transformers' classes that run as one kernel on a GPU, with the bits of the class's function."""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any, Final

import torch
from torch import Tensor, nn

from quarkconv.evaluate.layer_ops import on_kernels, rotate

_NAME: Final = "apply_rotary_pos_emb"
"""The function in each module of transformers that attention calls."""
_DECORATORS: Final = ("utils/deprecation.py",)
"""Files of transformers whose decorators only rename arguments that its own models no longer give."""
_LONGEST_HEAD: Final = 1024

Rotation = Callable[..., tuple[Tensor, Tensor]]


def fuse_rotary(model: nn.Module) -> None:
    """Have attention rotate queries and keys in one kernel each, where its function computes what :func:`rotate` does.

    A method gets a copy of its module's globals in which that name is another function: other models of the process
    keep their own.
    """
    known: dict[FunctionType, FunctionType | None] = {}
    for module in model.modules():
        forward = _undecorated(type(module).forward)
        if forward is None or "forward" in module.__dict__:
            continue
        if forward not in known:
            known[forward] = _on_kernel(forward)
        if (fused := known[forward]) is not None:
            module.forward = MethodType(fused, module)


def _undecorated(forward: Any) -> FunctionType | None:
    """The method that calls the function by its global name; None where there is none."""
    while hasattr(forward, "__wrapped__") and forward.__code__.co_filename.endswith(_DECORATORS):
        forward = forward.__wrapped__
    return forward if isinstance(forward, FunctionType) and _NAME in forward.__code__.co_names else None


def _on_kernel(forward: FunctionType) -> FunctionType | None:
    before = forward.__globals__.get(_NAME)
    if not callable(before) or not _rotates(before, 8, 8):
        return None
    rotation = _Rotation(before, partly=_rotates(before, 8, 4))
    namespace = {**forward.__globals__, _NAME: rotation}
    fused = FunctionType(forward.__code__, namespace, forward.__name__, forward.__defaults__, forward.__closure__)
    fused.__kwdefaults__ = copy.copy(forward.__kwdefaults__)
    return fused


class _Rotation:
    """The function of a module of transformers, on the kernel where its arguments fit.

    Args:
        before: the function.
        partly: it rotates the first elements of a head alone where cosines are shorter.
    """

    def __init__(self, before: Rotation, partly: bool) -> None:
        self._before, self._partly = before, partly

    def __call__(self, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs and on_kernels(q) and self._fits(q, cos, sin) and self._fits(k, cos, sin):
            return rotate(q, cos, sin), rotate(k, cos, sin)
        return self._before(q, k, cos, sin, *args, **kwargs)

    def _fits(self, states: Tensor, cos: Tensor, sin: Tensor) -> bool:
        size, rotated = states.shape[-1], cos.shape[-1]
        return (
            states.dim() == 4
            and cos.dim() == 3
            and cos.shape == sin.shape
            and len(cos) in (1, len(states))
            and cos.shape[1] == states.shape[2]
            and (rotated == size or (self._partly and rotated < size))
            and rotated % 2 == 0
            and size <= _LONGEST_HEAD
            and states.dtype == cos.dtype == sin.dtype
            and states.stride(-1) == cos.stride(-1) == sin.stride(-1) == 1
        )


def _rotates(function: Rotation, size: int, rotated: int) -> bool:
    """Whether a function computes what :func:`rotate` does: tried on random numbers, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, size, generator=generator).bfloat16() for heads in (3, 1))
    cos, sin = (torch.randn(2, 5, rotated, generator=generator).bfloat16() for _ in range(2))
    try:
        with torch.no_grad():
            found = function(q, k, cos, sin)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        return False
    expected = [_rotated(states, cos.unsqueeze(1), sin.unsqueeze(1)) for states in (q, k)]
    return len(found) == 2 and all(
        one.dtype == other.dtype and torch.equal(one, other) for one, other in zip(found, expected, strict=True)
    )


def _rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    turned, rest = states[..., : cos.shape[-1]], states[..., cos.shape[-1] :]
    first, second = turned.chunk(2, -1)
    return torch.cat([turned * cos + torch.cat([-second, first], -1) * sin, rest], -1)
