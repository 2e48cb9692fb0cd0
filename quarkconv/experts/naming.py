"""How models name the three projections of an expert.

Every routed expert computes ``down(act(gate(x)) * up(x))``. Checkpoints name the projections in families; engines that
load fused experts route their tensors by the same names, so a fused checkpoint keeps the family of its source.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, Literal

Role = Literal["gate", "up", "down"]
ROLES: Final[tuple[Role, Role, Role]] = ("gate", "up", "down")


@dataclass(frozen=True, slots=True)
class ExpertNaming:
    """A family of names.

    Attributes:
        gate, up, down: the projections of one expert, as in ``experts.3.gate_proj``.
        fused_gate_up: all experts' gate and up in one tensor [E, 2I, H], as in ``experts.gate_up_proj``.
        fused_down: all experts' down in one tensor [E, H, I].
    """

    gate: str
    up: str
    down: str
    fused_gate_up: str
    fused_down: str

    def projections(self) -> tuple[str, str, str]:
        """The names in the order of :data:`ROLES`."""
        return self.gate, self.up, self.down


NAMINGS: Final = (
    ExpertNaming("gate_proj", "up_proj", "down_proj", fused_gate_up="gate_up_proj", fused_down="down_proj"),
    ExpertNaming("w1", "w3", "w2", fused_gate_up="w13", fused_down="w2"),
)
"""The families that are understood. A new one is one row."""

STACKED_MODEL_TYPES: Final = frozenset({"step3p5"})
"""Model types whose own checkpoints have ``moe.gate_proj`` for all experts (3-key); engines know no other names."""

EXPERTS: Final = "experts"
"""Last part of the name of the module that holds the routed experts."""

BY_PROJECTION: Final[dict[str, tuple[ExpertNaming, Role]]] = {
    name: (naming, role) for naming in NAMINGS for name, role in zip(naming.projections(), ROLES, strict=True)
}
"""Name of a projection -> its family and role."""

FUSED_LEAVES: Final = frozenset(name for naming in NAMINGS for name in (naming.fused_gate_up, naming.fused_down))
"""Last parts of the names of fused tensors."""
