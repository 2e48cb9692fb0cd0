"""``fused-int8``: the experts of a layer in two int8 tensors, as fused MoE kernels want them.

For E experts with hidden size H and intermediate size I, under the prefix P of the experts' module:

    P.gate_up_proj               I8   [E, 2I, H]   rows 0..I-1 gate, rows I..2I-1 up
    P.gate_up_proj_scale         F32  [E, 2I, 1]
    P.down_proj                  I8   [E, H, I]
    P.down_proj_scale            F32  [E, H, 1]
    P.gate_up_proj_input_scale   F32  [E]          static activation scales only
    P.down_proj_input_scale      F32  [E]          static activation scales only

and ``w13``, ``w2`` instead of ``gate_up_proj``, ``down_proj`` where engines name the projections w1, w3, w2. vLLM
0.28 and later load these names through their compressed-tensors path (``RoutedExperts.load_weights``).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from quarkconv.description.description import Description
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.naming import Role
from quarkconv.plan.experts import ExpertSource
from quarkconv.plan.pieces import Check, OutputTensor
from quarkconv.targets.compressed_tensors_form import CompressedTensorsForm

_PARTS: Final[tuple[tuple[Role, ...], ...]] = (("gate", "up"), ("down",))


class FusedInt8(CompressedTensorsForm):
    """The target ``fused-int8``."""

    name = "fused-int8"
    summary = "experts of a layer in two int8 tensors; loads in vLLM 0.28 and later"
    by_rank = True

    def unsupported(self, description: Description) -> str | None:
        reason = super().unsupported(description)
        return reason or next(filter(None, map(_not_fused, description.int8_layers)), None)

    def expert_tensors(self, source: ExpertSource) -> Iterator[OutputTensor]:
        layer, naming = source.layer, source.engine_naming or source.layer.naming
        leaves = (naming.fused_gate_up, naming.fused_down)
        experts = source.experts
        for roles, leaf, inner in zip(_PARTS, leaves, (layer.hidden, source.intermediate), strict=True):
            name = f"{layer.prefix}.{leaf}"
            rows = sum(source.rows(role) for role in roles)
            parts = [source.part(role, expert) for expert in experts for role in roles]
            yield OutputTensor(name, "I8", (len(experts), rows, inner), tuple(part.codes for part in parts))
            yield OutputTensor(f"{name}_scale", "F32", (len(experts), rows, 1), tuple(part.scale for part in parts))
            static = tuple(part.input_scale for part in parts[:: len(roles)] if part.input_scale is not None)
            if len(static) == len(experts):
                yield OutputTensor(f"{name}_input_scale", "F32", (len(experts),), static)

    def expert_checks(self, source: ExpertSource) -> Iterator[Check]:
        """Gate and up of an expert share a static scale here, so theirs must be the same; they see the same input."""
        if source.layer.layout == "fused" or not source.layer.static:
            return
        for expert in source.experts:
            gate, up = source.whole("gate", expert).input_scale, source.whole("up", expert).input_scale
            if gate is not None and up is not None:
                yield Check("equal", gate.source, up.source)

    def expert_bytes(self, layer: MoELayer) -> int:
        codes = 3 * layer.hidden * layer.intermediate
        scales = 4 * (2 * layer.intermediate + layer.hidden)
        static = 8 if layer.static else 0
        return layer.experts * (codes + scales + static)


def _not_fused(layer: MoELayer) -> str | None:
    """The reason why engines do not load the fused experts of a layer; None where they do."""
    if not layer.gated:
        return f"{layer.prefix} has experts without a gate, which no engine loads fused"
    if layer.biased:
        return f"{layer.prefix} has experts with biases, which no engine loads fused"
    if layer.beside:
        return f"{layer.beside} is among the experts, and its meaning is unknown"
    if layer.joined:
        return f"{layer.prefix} stores gate and up of each expert as one projection, which no engine loads fused"
    if layer.naming.fused_gate_up is None:
        names = "/".join(layer.naming.projections())
        return f"{layer.prefix} names its experts' projections {names}, which no engine loads fused"
    return None
