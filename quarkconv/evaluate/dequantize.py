"""INT8 weights as floats, as the target ``bf16`` writes them: code times scale in float32, rounded once to bfloat16."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn

from quarkconv.evaluate.expert_classes import FLAT, identities, is_flat
from quarkconv.evaluate.layer_ops import on_kernels, scale_codes
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.naming import ROLES
from quarkconv.load.experts import FusedExperts


def dequantized(codes: Tensor, scale: Tensor) -> Tensor:
    """Code times scale in float32, rounded once; int8 [..., out, in], float32 [..., out] -> bfloat16 [..., out, in]."""
    if on_kernels(codes):
        return scale_codes(codes, scale)
    weights = torch.empty(codes.shape, dtype=torch.bfloat16, device=codes.device)
    for out, rows, factors in zip(
        _matrices(weights), _matrices(codes), scale.reshape(-1, codes.shape[-2]), strict=True
    ):
        out.copy_(rows.float() * factors.unsqueeze(1))  # one by one: all experts in float32 are four times the codes
    return weights


def _matrices(tensor: Tensor) -> Tensor:
    return tensor.view(-1, *tensor.shape[-2:])


def stacked(experts: FusedExperts, module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """The experts of a layer as the parameters of transformers' class, whose loader does not know their names.

    Args:
        experts: int8 experts.
        module: of DbrxExperts, or of a class with transformers' ``use_experts_implementation``, whose flags say how it
            keeps them.
    """
    if is_flat(module):
        for name, role in zip(FLAT, ROLES, strict=True):
            parts = [experts.projection(role, expert) for expert in range(experts.experts)]
            weights = [dequantized(part.codes, part.scale) for part in parts]
            yield f"mlp.{name}", torch.cat([weight.T for weight in weights] if role == "down" else weights)
        return
    interleaved = not module.is_concatenated
    for leaf, codes, scale, bias in (
        ("gate_up_proj" if module.has_gate else "up_proj", experts.w13, experts.w13_scale, experts.w13_bias),
        ("down_proj", experts.w2, experts.w2_scale, experts.w2_bias),
    ):
        weight = dequantized(codes, scale.squeeze(-1))
        if leaf == "gate_up_proj" and interleaved:
            weight, bias = _interleaved(weight), None if bias is None else _interleaved(bias)
        if leaf == "gate_up_proj" and (more := identities(module)):
            weight = torch.cat([weight, weight.new_zeros(more, *weight.shape[1:])])
        yield leaf, weight.transpose(1, 2).contiguous() if module.is_transposed else weight
        if bias is not None:
            yield f"{leaf}_bias", bias.to(torch.bfloat16)


class CodeWeights:
    """Experts in int8 as the floats of transformers' class, a part at a time.

    Args:
        experts: int8 experts.
        module: of the class.
    """

    def __init__(self, experts: FusedExperts, module: nn.Module) -> None:
        self._experts, self._module = experts, module

    def part(self, first: int, last: int, device: torch.device) -> Mapping[str, Tensor]:
        """Parameter of the class -> its experts ``first`` to ``last - 1``, on a device."""
        found = stacked(self._experts.part(first, last).to(device), self._module)
        return {name: tensor.to(self._module.get_parameter(name).dtype) for name, tensor in found}


def _interleaved(rows: Tensor) -> Tensor:
    """[E, 2I, ...] of all gates, then all ups -> gate and up in turn."""
    return torch.stack(rows.chunk(2, dim=1), dim=2).flatten(1, 2)


def expert_floats(layer: MoELayer, experts: FusedExperts) -> Iterator[tuple[str, Tensor]]:
    """The experts of a layer one by one, under the names of the unquantized model."""
    for expert in range(experts.experts):
        for leaf, roles in layer.leaves():
            projections = [experts.projection(role, expert) for role in roles]
            parts = [dequantized(projection.codes, projection.scale) for projection in projections]
            # Rows of gate and up in one projection: alternating, or one after the other.
            weight = torch.stack(parts, dim=1).flatten(0, 1) if layer.interleaved else torch.cat(parts)
            yield f"{layer.prefix}.{expert}.{leaf}.weight", weight
