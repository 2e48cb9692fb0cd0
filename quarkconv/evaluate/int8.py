"""INT8 modules in place of those of a transformers model: linears and routed experts."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise
from typing import Final, NamedTuple

import torch
from torch import Tensor, nn

from quarkconv.evaluate.expert_classes import run_one_each
from quarkconv.evaluate.int8_product import QuantizedRows, scaled_product
from quarkconv.evaluate.layer_ops import on_kernels
from quarkconv.experts.function import ExpertActivation
from quarkconv.kernels import fused_experts_int8, quantize_int8
from quarkconv.kernels.backend import device_guard
from quarkconv.kernels.launch.combine import combine_experts, combine_experts_reference
from quarkconv.load.experts import FusedExperts

_GROUPED: Final = "GroupedLinear"
"""Classes with ``n_groups`` that multiply the inputs of each group with its own rows: DeepseekV4GroupedLinear."""


class DtypeOf(NamedTuple):
    """Replaces the weight of an INT8 linear: a model may cast inputs to its dtype, but not multiply with it."""

    dtype: torch.dtype


class Int8Linear(nn.Module):
    """A W8A8 linear: codes int8 [out, in], a scale for each row float32 [out], activations quantized per token.

    With ``input_scale`` (float32, one element) activations take that static scale instead. Sums are exact; then
    ``sum * activation scale * weight scale + bias`` in float32, rounded once to the dtype of the input. ``dtype`` is
    that of the weight in floats. Linears that share ``rows`` quantize an input that several of them take once.
    """

    def __init__(
        self,
        codes: Tensor,
        scale: Tensor,
        bias: Tensor | None,
        input_scale: Tensor | None,
        dtype: torch.dtype = torch.bfloat16,
        rows: QuantizedRows | None = None,
    ) -> None:
        super().__init__()
        self.weight = DtypeOf(dtype)
        self._rows = QuantizedRows() if rows is None else rows
        self.codes = codes
        self.scale = scale
        self.bias = bias
        self.input_scale = input_scale
        self.out_features, self.in_features = codes.shape

    def forward(self, states: Tensor) -> Tensor:
        """floats [..., in] -> [..., out], in the same dtype."""
        if self.input_scale is None:
            codes, scales = self._rows.of(states)
        else:
            rows = states.reshape(-1, states.shape[-1])
            codes, scales = quantize_int8(rows, granularity="per_tensor", scale=self.input_scale)
        result = scaled_product(codes, scales, self.codes, self.scale, self.bias, states.dtype)
        return result.reshape(*states.shape[:-1], -1)


class Int8GroupedLinear(nn.Module):
    """Linears side by side, each with its own inputs: [..., groups, in] -> [..., groups, out].

    Args:
        parts: one for each group.
    """

    def __init__(self, parts: Iterable[Int8Linear]) -> None:
        super().__init__()
        self.parts = list(parts)
        self.n_groups = len(self.parts)

    def forward(self, states: Tensor) -> Tensor:
        """Each group of a token is quantized by itself."""
        return torch.stack([part(inputs) for part, inputs in zip(self.parts, states.unbind(-2), strict=True)], dim=-2)


def linear_groups(module: nn.Module) -> int:
    """How many linears a module holds below one another: 0 for classes that compute something else, such as routers."""
    if not isinstance(module, nn.Linear):
        return 0
    if type(module).forward is nn.Linear.forward:
        return 1
    groups = getattr(module, "n_groups", None)
    return groups if isinstance(groups, int) and type(module).__name__.endswith(_GROUPED) else 0


class Int8Experts(nn.Module):
    """Routed experts that run on :func:`quarkconv.kernels.fused_experts_int8`, in the place of transformers' own.

    Args:
        experts: the experts.
        activation: what they compute.
        group: how many of them are on the device of the inputs at a time, for those on the CPU; None for all.
        identities: how many experts after them return their input, times the weight.
    """

    def __init__(
        self, experts: FusedExperts, activation: ExpertActivation, group: int | None = None, identities: int = 0
    ) -> None:
        super().__init__()
        self.experts = experts
        self.activation = activation
        self.group = group
        self.identities = identities

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[M, H], int64 [M, k], floats [M, k] -> [M, H]."""
        shape = hidden_states.shape
        states = hidden_states.reshape(-1, shape[-1])
        wide = states if states.dtype in (torch.bfloat16, torch.float16) else states.to(torch.bfloat16)
        weights = top_k_weights.reshape(len(states), -1).float().contiguous()
        ids = top_k_index.reshape(len(states), -1).contiguous()
        if self.group is None:
            result = self._run(self.experts, wide.contiguous(), ids, weights)
        else:
            result = self._in_groups(self.group, wide, ids, weights)
        if self.identities:
            share = (weights * (ids >= self.experts.experts)).sum(-1, keepdim=True)
            result = result.float() + share * states.float()
        return result.to(hidden_states.dtype).reshape(shape)

    def _run(self, experts: FusedExperts, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        return fused_experts_int8(
            states,
            experts.w13,
            experts.w2,
            experts.w13_scale,
            experts.w2_scale,
            weights,
            ids,
            activation=self.activation.name,
            activation_limit=self.activation.limit,
            w13_input_scale=experts.w13_input_scale,
            w2_input_scale=experts.w2_input_scale,
            w13_bias=experts.w13_bias,
            w2_bias=experts.w2_bias,
        )

    def _in_groups(self, group: int, states: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        """The same sums, in the same order: outputs of experts are rounded before they are weighted and added."""
        top_k, count = ids.shape[1], self.experts.experts
        ordered, order = ids.flatten().sort()
        starts = range(0, count, group)
        limits = torch.searchsorted(ordered, torch.tensor([*starts, count], device=ids.device, dtype=ids.dtype))
        rows = torch.zeros((ids.numel(), states.shape[1]), dtype=states.dtype, device=states.device)
        for first, (start, end) in zip(starts, pairwise(limits.tolist()), strict=True):
            if start < end:
                pairs = order[start:end]
                part = self.experts.part(first, min(first + group, count)).to(states.device)
                alone = (ordered[start:end] - first).unsqueeze(1)
                ones = torch.ones(alone.shape, dtype=torch.float32, device=states.device)
                rows[pairs] = self._run(part, states[pairs // top_k], alone, ones)
        if not on_kernels(states):
            return combine_experts_reference(rows, weights, ids, count, states.dtype)
        with device_guard(states.device):
            return combine_experts(rows, weights, ids, count, torch.empty_like(states))


class ExpertLeftOut(nn.Module):
    """Routed experts in INT8, of which one computes in floats.

    Args:
        experts: all of them in INT8.
        floats: all of them in floats, a module of transformers.
        expert: the one that computes in floats.
    """

    def __init__(self, experts: Int8Experts, floats: nn.Module, expert: int) -> None:
        super().__init__()
        self.experts, self.floats, self.expert = experts, floats, expert

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[M, H], int64 [M, k], floats [M, k] -> [M, H]."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        ids, weights = top_k_index.reshape(len(tokens), -1), top_k_weights.reshape(len(tokens), -1)
        chosen = ids == self.expert
        result: Tensor = self.experts(tokens, ids.masked_fill(chosen, -1), weights)
        rows = chosen.any(-1)
        if bool(rows.any()):
            share = (weights * chosen).sum(-1, keepdim=True)[rows]
            ids_alone = torch.full_like(share, self.expert, dtype=torch.int64)
            alone = run_one_each(self.floats, tokens[rows], ids_alone, share)
            result = result.clone()
            result[rows] += alone.reshape(-1, tokens.shape[-1])
        return result.reshape(hidden_states.shape)
