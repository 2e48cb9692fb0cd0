"""Norms of transformers' classes that run as one kernel on a GPU."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor, nn

from quarkconv.evaluate.layer_ops import LONGEST_NORM, on_kernels, rms_norm

_EPS: Final = ("variance_epsilon", "eps")
_NARROW: Final = (torch.bfloat16, torch.float16)


def fuse_norms(model: nn.Module) -> None:
    """Have RMS norms of 16-bit states run in one kernel, where their class computes what :func:`rms_norm` does."""
    known: dict[type[nn.Module], bool] = {}
    for module in model.modules():
        if (eps := _eps(module)) is None:
            continue
        kind = type(module)
        if kind not in known:
            known[kind] = _is_rms_norm(module, eps)
        if known[kind]:
            module.forward = partial(_forward, module, module.forward, eps)


def _forward(module: Any, before: Any, eps: float, states: Tensor) -> Tensor:
    fits = states.dtype in _NARROW and states.dtype == module.weight.dtype and states.shape[-1] <= LONGEST_NORM
    result: Tensor = rms_norm(states, module.weight, eps) if fits and on_kernels(states) else before(states)
    return result


def _eps(module: nn.Module) -> float | None:
    """What a norm adds to the mean; None where a module has more than a weight, or no such number."""
    weight = module._parameters.get("weight")
    others = len(module._parameters) > 1 or module._buffers or module._modules
    if weight is None or weight.dim() != 1 or others or "Norm" not in type(module).__name__:
        return None
    return next((found for name in _EPS if isinstance(found := getattr(module, name, None), float)), None)


def _is_rms_norm(module: nn.Module, eps: float) -> bool:
    """Whether a class computes an RMS norm with these roundings: tried on random numbers, on the CPU."""
    generator = torch.Generator().manual_seed(0)
    length = module.get_parameter("weight").shape[0]
    states = (torch.randn(4, length, generator=generator) * torch.tensor([[1e-4], [1.0], [8.0], [300.0]])).bfloat16()
    probe: Any = copy.copy(module)
    weight = (torch.randn(length, generator=generator) + 0.5).bfloat16()
    probe._parameters = {"weight": nn.Parameter(weight, requires_grad=False)}
    try:
        with torch.no_grad():
            found = probe(states)
    except (AttributeError, RuntimeError, TypeError):
        return False
    wide = states.float()
    scaled = (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)).bfloat16()
    return isinstance(found, Tensor) and found.dtype == states.dtype and torch.equal(found, weight * scaled)
