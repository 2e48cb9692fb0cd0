"""Routed experts in floats: those of a class of transformers, as its ``grouped_mm`` computes them, with less traffic.

The products are transformers' own functions. On a GPU ``silu(gate) * up`` is one kernel, and weights, order and sum are
another, with the same roundings. Experts may be computed in groups whose weights are on the device one after the other:
rows are sorted by expert, so each row is multiplied as before.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from quarkconv.evaluate.layer_ops import on_kernels, silu_gate, sum_experts

_IMPLEMENTATION: Final = "grouped_mm"
"""The name of this computation in transformers, which takes it by default where torch has the product."""


class ExpertWeights(Protocol):
    """The weights of a layer's experts, wherever they are."""

    def part(self, first: int, last: int, device: torch.device) -> Mapping[str, Tensor]:
        """Parameter of the class -> its experts ``first`` to ``last - 1``, on a device."""


class OwnWeights:
    """The parameters of the module itself, on the device or on the CPU."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module

    def part(self, first: int, last: int, device: torch.device) -> Mapping[str, Tensor]:
        """Parameter of the class -> its experts ``first`` to ``last - 1``, on a device."""
        return {name: item[first:last].to(device) for name, item in self._module.named_parameters(recurse=False)}


class FloatExperts:
    """The forward of routed experts in floats.

    Args:
        module: of a class with transformers' ``use_experts_implementation``.
        group: how many experts are on the device at a time; None for all.

    Attributes:
        weights: where weights come from.
    """

    def __init__(self, module: nn.Module, group: int | None = None) -> None:
        self._module: Any = module
        self._group = group
        self._gate_is_silu = _gate_is_silu(module)
        self.weights: ExpertWeights = OwnWeights(module)

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[M, H], int64 [M, k], floats [M, k] -> [M, H]."""
        top_k, count = top_k_index.shape[-1], int(self._module.num_experts)
        ids, order = torch.sort(top_k_index.reshape(-1).to(torch.int16))  # a pass over the pairs for each byte
        ids = ids.long()
        places = torch.empty_like(order)
        places[order] = torch.arange(len(order), device=order.device)
        tokens = order // top_k
        ends = torch.histc(ids.int() if ids.is_cuda else ids.float(), bins=count, min=0, max=count - 1)
        ends = ends.cumsum(0, dtype=torch.int32)
        if self._group is None:
            rows = self._rows(hidden_states[tokens], ids, ends, self.weights.part(0, count, hidden_states.device))
        else:
            rows = torch.empty((len(ids), hidden_states.shape[-1]), dtype=hidden_states.dtype, device=ids.device)
            limits = [0, *ends.tolist()]
            for first in range(0, count, self._group):
                last = min(first + self._group, count)
                here = slice(limits[first], limits[last])
                if here.start < here.stop:
                    weights = self.weights.part(first, last, hidden_states.device)
                    moved = ends[first:last] - limits[first]
                    rows[here] = self._rows(hidden_states[tokens[here]], ids[here] - first, moved, weights)
        if on_kernels(rows):
            return sum_experts(rows, places, top_k_weights, hidden_states.dtype)
        weighted = rows * top_k_weights.reshape(-1)[order].unsqueeze(-1)
        return weighted[places].view(len(hidden_states), top_k, -1).sum(dim=1).to(hidden_states.dtype)

    def _rows(self, rows: Tensor, ids: Tensor, ends: Tensor, weights: Mapping[str, Tensor]) -> Tensor:
        """Outputs of experts, [n, H], of rows that are sorted by expert."""
        from transformers.integrations.moe import _grouped_linear

        module = self._module

        def product(name: str, inputs: Tensor) -> Tensor:
            bias = weights[f"{name}_bias"][ids] if module.has_bias else None
            result: Tensor = _grouped_linear(inputs, weights[name], ends, bias=bias, is_transposed=module.is_transposed)
            return result

        if module.has_gate:
            joined = product("gate_up_proj", rows)
            inner = silu_gate(joined) if self._gate_is_silu and on_kernels(joined) else module._apply_gate(joined)
        else:
            inner = module.act_fn(product("up_proj", rows))
        found = product("down_proj", inner)
        if getattr(module, "has_post_expert_norm", False):
            found = module.post_expert_norm(found)
        return found


def _gate_is_silu(module: Any) -> bool:
    """Whether these experts compute ``silu(gate) * up`` of gates before ups."""
    try:
        from transformers.integrations.moe import _default_apply_gate
    except ImportError:
        return False
    function = getattr(module, "act_fn", None)
    silu = isinstance(function, nn.SiLU) or type(function).__name__ == "SiLUActivation"
    return silu and type(module)._apply_gate is _default_apply_gate


def computes_grouped(module: nn.Module) -> bool:
    """Whether transformers computes these experts with ``grouped_mm``, and its functions have the names used here."""
    try:
        from transformers.integrations.moe import _grouped_linear  # noqa: F401
    except ImportError:
        return False
    config = getattr(module, "config", None)
    names = ("has_gate", "has_bias", "is_transposed", "is_concatenated", "num_experts", "_apply_gate")
    return (
        all(hasattr(module, name) for name in names)
        and getattr(config, "_experts_implementation", None) == _IMPLEMENTATION
        and not getattr(module, "_is_expert_parallel", False)
    )
