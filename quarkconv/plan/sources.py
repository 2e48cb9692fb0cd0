"""Pieces of the experts of a layer, whatever layout the source has.

Targets ask for "the gate rows of expert 3" and get byte ranges; only this module knows whether they lie in a tensor of
their own, in a tensor of all experts (3-key), or in the upper half of a fused one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from quarkconv.experts.naming import Role
from quarkconv.experts.topology import MoELayer
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.pieces import Piece
from quarkconv.scheme.spec import PER_CHANNEL
from quarkconv.scheme.stored import NARROW_DTYPES, TensorNames, fused_names, linear_names


def scale_piece(name: str, ref: TensorRef, rows: int, *, part: int = 0, parts: int = 1, per_row: bool) -> Piece:
    """A scale as ``rows`` elements of F32: widened if it is narrower, repeated if it is one for all rows.

    Args:
        name, ref: the scale tensor.
        rows: number of output rows that the scale is for.
        part, parts: which of how many equal parts of the tensor.
        per_row: whether the part has an element for every row, or one for all.
    """
    nbytes = ref.nbytes // parts
    widen = ref.dtype if ref.dtype in NARROW_DTYPES else ""
    return Piece(name, ref.file, ref.start + part * nbytes, nbytes, widen, 1 if per_row else rows)


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """The experts of one layer as pieces of the source.

    Attributes:
        layer: the layer.
        refs: byte range of every tensor of the source.
    """

    layer: MoELayer
    refs: Mapping[str, TensorRef]

    def names(self, role: Role, expert: int) -> TensorNames:
        """Names of the tensors in which a projection of an expert lies."""
        layer, naming = self.layer, self.layer.naming
        if layer.layout == "fused":
            leaf = naming.fused_down if role == "down" else naming.fused_gate_up
            return fused_names(f"{layer.prefix}.{leaf}")
        leaf = {"gate": naming.gate, "up": naming.up, "down": naming.down}[role]
        head = f"{layer.prefix}.{expert}" if layer.layout == "per_expert" else layer.moe
        return linear_names(f"{head}.{leaf}")

    def rows(self, role: Role) -> int:
        """Output rows of a projection: I for gate and up, H for down."""
        return self.layer.hidden if role == "down" else self.layer.intermediate

    def weight(self, role: Role, expert: int) -> Piece:
        """The codes of one projection of one expert: [I, H] or, for down, [H, I]."""
        name = self.names(role, expert).weight
        ref = self.refs[name]
        part, parts = self._part(role, expert)
        nbytes = ref.nbytes // parts
        return Piece(name, ref.file, ref.start + part * nbytes, nbytes)

    def scale(self, role: Role, expert: int) -> Piece:
        """The weight scale of one projection of one expert, as F32 for each of its rows."""
        name = self.names(role, expert).scale
        ref = self.refs[name]
        per_row = self._form_granularity(role, expert) == PER_CHANNEL
        if per_row or self.layer.layout != "fused":
            part, parts = self._part(role, expert)
        else:  # one scale for gate and up together
            part, parts = expert, self.layer.experts
        return scale_piece(name, ref, self.rows(role), part=part, parts=parts, per_row=per_row)

    def input_scale(self, role: Role, expert: int) -> Piece | None:
        """The static input scale of one projection of one expert, one element of F32; None where there is none."""
        name = self.names(role, expert).input_scale
        ref = self.refs.get(name)
        if ref is None:
            return None
        parts = prod(ref.shape)
        return scale_piece(name, ref, 1, part=expert if parts > 1 else 0, parts=parts, per_row=False)

    def _part(self, role: Role, expert: int) -> tuple[int, int]:
        """Which of how many equal parts of its tensors a projection of an expert is."""
        layer = self.layer
        if layer.layout == "per_expert":
            return 0, 1
        if layer.layout == "fused" and role != "down":
            return 2 * expert + (role == "up"), 2 * layer.experts
        return expert, layer.experts

    def _form_granularity(self, role: Role, expert: int) -> str | None:
        layer = self.layer
        if layer.layout == "per_expert":
            return layer.forms[role][expert].granularity
        return layer.forms["gate" if layer.layout == "fused" and role == "up" else role][0].granularity
