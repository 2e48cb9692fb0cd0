"""Products of int8 codes with exact sums, and what an INT8 linear makes of them."""

from __future__ import annotations

from functools import lru_cache
from typing import Final
from weakref import ReferenceType, ref

import torch
from torch import Tensor

from quarkconv.evaluate.layer_ops import on_kernels, scale_sums
from quarkconv.kernels import quantize_int8
from quarkconv.kernels.arguments import ExpertWeights, RoutingPlan
from quarkconv.kernels.backend import device_guard, device_traits
from quarkconv.kernels.launch.descriptors import can_describe
from quarkconv.kernels.launch.grouped_gemm import grouped_down
from quarkconv.kernels.launch.routing import empty_plan, route_pairs
from quarkconv.kernels.options import fit_options, specialized_tiles
from quarkconv.kernels.tables import LaunchOptions, RowBlocks

_INT_MM_ROWS: Final = 32
"""``torch._int_mm`` on CUDA wants more than 16 rows; shorter inputs are padded to this."""
_INT_MM_MULTIPLE: Final = 8
"""... and inner and outer sizes that are multiples of 8; others are multiplied in float64, which is exact as well."""
_BLOCKS: Final = RowBlocks(128, tail_m=32, small_m=64)
"""Rows of a tile of :func:`_one_expert`, as those of experts with many rows."""


def int8_product(left: Tensor, right: Tensor) -> Tensor:
    """Exact sums of int8 [M, K] times int8 [N, K] transposed, int32 [M, N]."""
    rows, inner = left.shape
    if inner % _INT_MM_MULTIPLE or right.shape[0] % _INT_MM_MULTIPLE:
        return (left.double() @ right.double().T).to(torch.int32)
    if rows < _INT_MM_ROWS:
        left = torch.cat([left, left.new_zeros(_INT_MM_ROWS - rows, inner)])
    sums: Tensor = torch._int_mm(left, right.T)
    return sums[:rows]


def scaled_product(
    codes: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """``sum * row scale * column scale + bias``: exact sums, the rest in float32, rounded once to ``dtype``.

    Args:
        codes: int8 [M, K].
        row_scale: float32 [M], or one element.
        weight: int8 [N, K].
        scale: float32 [N].
        bias: floats [N], or None.
        dtype: of the result [M, N].
    """
    row_scale = row_scale.reshape(-1)
    if on_kernels(codes):
        row_scale = row_scale.expand(len(codes)).contiguous()
        if bias is None and _runs_as_expert(codes, weight):
            return _one_expert(codes, row_scale, weight, scale, dtype)
        return scale_sums(int8_product(codes, weight), row_scale, scale, bias, dtype)
    result = int8_product(codes, weight) * row_scale.unsqueeze(1)  # converted to float32 on the way
    if bias is not None:
        return (result * scale + bias.float()).to(dtype)
    out = torch.empty(result.shape, dtype=dtype, device=result.device)
    return torch.mul(result, scale, out=out)  # rounded on the way


class QuantizedRows:
    """The codes of the rows that were quantized last: linears side by side, such as q, k and v, take the same."""

    def __init__(self) -> None:
        self._states: ReferenceType[Tensor] | None = None
        self._version = 0
        self._found: tuple[Tensor, Tensor] | None = None

    def of(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """floats [..., K] -> codes int8 [M, K] and scales float32 [M, 1]."""
        same = self._states is not None and self._states() is states and self._version == states._version
        if self._found is None or not same:
            self._found = quantize_int8(states.reshape(-1, states.shape[-1]))
            self._states, self._version = ref(states), states._version
        return self._found


def _runs_as_expert(codes: Tensor, weight: Tensor) -> bool:
    """Whether the product of routed experts runs on specialized warps: then it is faster than torch's."""
    described = weight.is_contiguous() and can_describe(codes) and can_describe(weight)
    return described and len(codes) > 0 and device_traits(codes.device).warp_specialization


def _one_expert(codes: Tensor, row_scale: Tensor, weight: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The product as that of a layer with one routed expert, which writes no sums."""
    rows, (columns, depth) = len(codes), weight.shape
    _, tiles = specialized_tiles(group_m=4)
    options = fit_options(LaunchOptions(_BLOCKS, *tiles), depth, depth, device_traits(codes.device))
    assert isinstance(options, LaunchOptions)
    out = torch.empty((rows, columns), dtype=dtype, device=codes.device)
    with device_guard(codes.device):
        plan = _all_rows(rows, options.blocks, codes.device)
        experts = ExpertWeights(weight.unsqueeze(0), scale.reshape(1, -1, 1), None)
        return grouped_down(codes, row_scale, experts, plan, out, options.down)


@lru_cache(maxsize=16)
def _all_rows(rows: int, blocks: RowBlocks, device: torch.device) -> RoutingPlan:
    """All rows to the one expert. Products that are launched one after the other share it."""
    ids = torch.zeros(rows, dtype=torch.int32, device=device)
    return route_pairs(ids, 1, empty_plan(rows, 1, blocks, device))
