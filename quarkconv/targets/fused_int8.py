"""``fused-int8``: the experts of a layer in two int8 tensors, as fused MoE kernels want them.

For E experts with hidden size H and intermediate size I, under the prefix P of the experts' module:

    P.gate_up_proj               I8   [E, 2I, H]   rows 0..I-1 gate, rows I..2I-1 up
    P.gate_up_proj_scale         F32  [E, 2I, 1]
    P.down_proj                  I8   [E, H, I]
    P.down_proj_scale            F32  [E, H, 1]
    P.gate_up_proj_input_scale   F32  [E]          static activation scales only
    P.down_proj_input_scale      F32  [E]          static activation scales only

and ``w13``, ``w2`` instead of ``gate_up_proj``, ``down_proj`` where the source names its projections w1, w3, w2. vLLM
0.28 and later load these names through their compressed-tensors path (``RoutedExperts.load_weights``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from quarkconv.description import Description
from quarkconv.experts.naming import Role
from quarkconv.experts.topology import MoELayer
from quarkconv.plan.pieces import OutputTensor
from quarkconv.plan.sources import ExpertSource
from quarkconv.plan.target import Target
from quarkconv.targets.compressed_tensors_config import compressed_tensors_config

_PARTS: Final[tuple[tuple[Role, ...], ...]] = (("gate", "up"), ("down",))


class FusedInt8(Target):
    """The target ``fused-int8``."""

    name = "fused-int8"
    summary = "experts of a layer in two int8 tensors; loads in vLLM 0.28 and later"

    def unsupported(self, description: Description) -> str | None:
        if not description.moe_layers:
            return "it has no routed experts"
        if not description.int8_layers:
            return "none of its experts are stored in int8"
        for layer in description.moe_layers:
            if layer.partly_quantized:
                return f"{layer.prefix} mixes experts in int8 and in float"
        if description.scheme is None:
            return "it has int8 modules that are not W8A8"
        if len({scheme.activation for scheme in description.schemes}) > 1:
            return "it mixes static and dynamic activation scales, which one config group cannot say"
        return None

    def expert_tensors(self, source: ExpertSource) -> Iterator[OutputTensor]:
        layer = source.layer
        leaves = (layer.naming.fused_gate_up, layer.naming.fused_down)
        for roles, leaf, inner in zip(_PARTS, leaves, (layer.hidden, layer.intermediate), strict=True):
            name = f"{layer.prefix}.{leaf}"
            rows = sum(source.rows(role) for role in roles)
            experts = range(layer.experts)
            codes = tuple(source.weight(role, expert) for expert in experts for role in roles)
            yield OutputTensor(name, "I8", (layer.experts, rows, inner), codes)
            scales = tuple(source.scale(role, expert) for expert in experts for role in roles)
            yield OutputTensor(f"{name}_scale", "F32", (layer.experts, rows, 1), scales)
            static = tuple(filter(None, (source.input_scale(roles[0], expert) for expert in experts)))
            if len(static) == layer.experts:
                yield OutputTensor(f"{name}_input_scale", "F32", (layer.experts,), static)

    def expert_bytes(self, layer: MoELayer) -> int:
        codes = 3 * layer.hidden * layer.intermediate
        scales = 4 * (2 * layer.intermediate + layer.hidden)
        static = 8 if all(form.input_scale is not None for form in layer.all_forms) else 0
        return layer.experts * (codes + scales + static)

    def config(self, description: Description) -> dict[str, Any]:
        return compressed_tensors_config(description)
