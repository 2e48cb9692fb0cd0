"""The routed experts of one layer as tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quarkconv.experts.naming import ROLES, Role


@dataclass(frozen=True, slots=True)
class FusedExperts:
    """The routed experts of one layer, as :func:`quarkconv.kernels.fused_experts_int8` takes them.

    E experts, hidden size H, intermediate size I.

    Attributes:
        layer: number of the layer.
        module: module of the experts, such as ``model.layers.3.mlp.experts``.
        w13: int8 [E, 2I, H]; rows 0..I-1 are gate, rows I..2I-1 up. Of experts without a gate [E, I, H].
        w13_scale: float32 [E, 2I, 1].
        w2: int8 [E, H, I].
        w2_scale: float32 [E, H, 1].
        w13_input_scale, w2_input_scale: float32 [E], or None where activations are quantized per token.
        w13_bias, w2_bias: float32 [E, 2I] and [E, H], or None.
    """

    layer: int
    module: str
    w13: Tensor
    w13_scale: Tensor
    w2: Tensor
    w2_scale: Tensor
    w13_input_scale: Tensor | None = None
    w2_input_scale: Tensor | None = None
    w13_bias: Tensor | None = None
    w2_bias: Tensor | None = None

    @property
    def roles(self) -> tuple[Role, ...]:
        """The projections that an expert has."""
        return ROLES if self.w13.shape[1] > self.intermediate_size else ROLES[1:]

    @property
    def experts(self) -> int:
        """E."""
        return self.w13.shape[0]

    @property
    def hidden_size(self) -> int:
        """H."""
        return self.w13.shape[2]

    @property
    def intermediate_size(self) -> int:
        """I."""
        return self.w2.shape[2]

    @property
    def nbytes(self) -> int:
        """Size of all tensors in bytes."""
        return sum(tensor.nbytes for tensor in self._tensors() if tensor is not None)

    def part(self, first: int, last: int) -> FusedExperts:
        """Experts ``first`` to ``last - 1``, as views."""
        return self._changed(lambda tensor: tensor[first:last])

    def projection(self, role: Role, expert: int) -> Projection:
        """One projection of one expert, as views."""
        inner = self.intermediate_size
        if role == "down":
            rows = slice(None)
            codes, scale, static, bias = self.w2, self.w2_scale, self.w2_input_scale, self.w2_bias
        else:
            first = inner * self.roles.index(role)
            rows = slice(first, first + inner)
            codes, scale, static, bias = self.w13, self.w13_scale, self.w13_input_scale, self.w13_bias
        return Projection(
            codes[expert][rows],
            scale[expert][rows].reshape(-1),
            None if static is None else static[expert],
            None if bias is None else bias[expert][rows],
        )

    def to(self, device: torch.device, *, non_blocking: bool = False) -> FusedExperts:
        """The same on a device."""
        return self._changed(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def _changed(self, change: Callable[[Tensor], Tensor]) -> FusedExperts:
        """The same layer, with each of its tensors changed."""

        def optional(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else change(tensor)

        return replace(
            self,
            w13=change(self.w13),
            w13_scale=change(self.w13_scale),
            w2=change(self.w2),
            w2_scale=change(self.w2_scale),
            w13_input_scale=optional(self.w13_input_scale),
            w2_input_scale=optional(self.w2_input_scale),
            w13_bias=optional(self.w13_bias),
            w2_bias=optional(self.w2_bias),
        )

    def _tensors(self) -> tuple[Tensor | None, ...]:
        input_scales = self.w13_input_scale, self.w2_input_scale
        return self.w13, self.w13_scale, self.w2, self.w2_scale, *input_scales, self.w13_bias, self.w2_bias


@dataclass(frozen=True, slots=True)
class Projection:
    """One projection of one expert: codes int8 [out, in], a scale per row float32 [out], a static input scale, a bias
    [out]."""

    codes: Tensor
    scale: Tensor
    input_scale: Tensor | None
    bias: Tensor | None = None

    def dequantized(self, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The weight [out, in] in ``dtype``: code times scale."""
        return self.codes.to(device).to(dtype) * self.scale.to(device).to(dtype).unsqueeze(1)

    def to(self, device: torch.device) -> Projection:
        """The same on a device."""
        others = [None if tensor is None else tensor.to(device) for tensor in (self.input_scale, self.bias)]
        return Projection(self.codes.to(device), self.scale.to(device), *others)
