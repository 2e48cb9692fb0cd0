"""Classes of transformers for the routed experts of a layer: how each keeps its weights."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Iterator, Mapping
from typing import Any, Final

import torch
from torch import Tensor, nn

FLAT: Final = ("w1", "v1", "w2")
"""Matrices of gate, up and down, of classes that keep experts below one another."""
ROUTED: Final = ("hidden_states", "top_k_index", "top_k_weights")
"""Arguments of routed experts in transformers."""


def is_routed(module: nn.Module) -> bool:
    """Whether a module holds all routed experts of a layer, in a layout that is known."""
    return is_flat(module) or (hasattr(module, "is_concatenated") and hasattr(module, "has_gate"))


def set_layout(module: nn.Module) -> None:
    """Set how a class keeps its experts, as transformers' ``use_experts_implementation`` does, where it is not used.

    That is gate above up in ``gate_up_proj`` [E, 2I, H], and ``down_proj`` [E, H, I]: Step3p7Experts.
    LongcatFlashExperts has rows of ``gate_up_proj`` for its identities as well, which it does not read.
    """
    gate_up, down = (module._parameters.get(name) for name in ("gate_up_proj", "down_proj"))
    if hasattr(module, "is_concatenated") or gate_up is None or down is None or gate_up.dim() != 3 or down.dim() != 3:
        return
    experts, hidden, inner = down.shape
    arguments = list(inspect.signature(type(module).forward).parameters)
    if gate_up.shape == (experts + identities(module), 2 * inner, hidden) and arguments[1:] == list(ROUTED):
        layout: Any = module
        layout.has_gate, layout.is_concatenated, layout.is_transposed = True, True, False


def expert_count(module: nn.Module) -> int:
    """Number of routed experts of a class, without identities; 0 where it is not known."""
    down = module._parameters.get("down_proj")
    if down is not None and down.dim() == 3:
        return int(down.shape[0])
    count = getattr(module, "num_experts", 0)
    return count if isinstance(count, int) else 0


def identities(module: nn.Module) -> int:
    """How many experts of a class return their input, times the weight; their numbers follow those of the others."""
    count = getattr(module, "zero_expert_num", 0)
    return count if isinstance(count, int) else 0


def run_one_each(module: nn.Module, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Experts in floats on tokens with one choice each: [M, H], int64 [M, 1], floats [M, 1] -> [M, H].

    LongcatFlashExperts fails with one choice (transformers 5.24): it takes the same expert again, with weight zero.
    """
    if identities(module):
        ids, weights = ids.repeat(1, 2), torch.cat([weights, torch.zeros_like(weights)], dim=1)
    found: Tensor = module(states, ids, weights)
    return found


def with_identities(path: str, module: nn.Module, tensors: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """The projections of identities, zeros: a class has a parameter for them, and published checkpoints no tensor.

    Args:
        path: of the routed experts.
        module: of their class.
        tensors: name -> tensor of a checkpoint that stores experts one by one.
    """
    for leaf in ("gate_proj", "up_proj") if identities(module) else ():
        first = tensors.get(f"{path}.0.{leaf}.weight")
        if first is None:
            continue
        count = next(number for number in itertools.count(1) if f"{path}.{number}.{leaf}.weight" not in tensors)
        total = int(module.get_parameter("gate_up_proj").shape[0])
        yield from ((f"{path}.{number}.{leaf}.weight", torch.zeros_like(first)) for number in range(count, total))


def is_flat(experts: nn.Module) -> bool:
    """Whether a class keeps its experts below one another in matrices w1, v1 and w2, [E * I, H]: DbrxExperts."""
    return all(isinstance(getattr(getattr(experts, "mlp", None), name, None), nn.Parameter) for name in FLAT)
