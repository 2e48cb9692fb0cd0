"""Pieces of the int8 modules of a source, whatever layout it has.

Targets ask for "the gate rows of expert 3" and get byte ranges; only this module knows whether they lie in a tensor of
their own, in a tensor of all experts (3-key), or in the upper half of a fused one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import prod

from quarkconv.experts.naming import ROLES, Role
from quarkconv.experts.ranks import WHOLE, Rank
from quarkconv.experts.topology import Layout, MoELayer
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.pieces import Piece
from quarkconv.scheme.spec import PER_CHANNEL
from quarkconv.scheme.stored import NARROW_DTYPES, Form, linear_names


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
class Int8Module:
    """An int8 linear of the output, under the name that it has there, as pieces of the source.

    Attributes:
        name: module, such as ``model.layers.0.self_attn.q_proj``.
        shape: of the weight: [out, in], or [E, out, in] for the experts of a layer in one tensor.
        codes: pieces of the weight, in order; each holds whole rows.
        scales: pieces of the weight's scale as F32 for each row, one for each of ``codes``.
        input_scales: pieces of the static input scale, one element of F32 each; none where activations are dynamic.
        input_shape: of the static input scale.
    """

    name: str
    shape: tuple[int, ...]
    codes: tuple[Piece, ...]
    scales: tuple[Piece, ...]
    input_scales: tuple[Piece, ...] = ()
    input_shape: tuple[int, ...] = ()


def linear_module(name: str, form: Form, refs: Mapping[str, TensorRef]) -> Int8Module:
    """A linear of the source that keeps its name and shape."""
    names = linear_names(name)
    shape = form.weight.shape
    *lead, rows, _ = shape
    parts = prod(lead)
    weight, scale, per_row = refs[names.weight], refs[names.scale], form.granularity == PER_CHANNEL
    size = weight.nbytes // parts if parts else 0
    codes = tuple(Piece(names.weight, weight.file, weight.start + part * size, size) for part in range(parts))
    scales = tuple(
        scale_piece(names.scale, scale, rows, part=part, parts=parts, per_row=per_row) for part in range(parts)
    )
    if form.input_scale is None:
        return Int8Module(name, shape, codes, scales)
    static = refs[names.input_scale]
    pieces = (scale_piece(names.input_scale, static, 1, per_row=False),)
    return Int8Module(name, shape, codes, scales, pieces, form.input_scale.shape)


def expert_modules(source: ExpertSource) -> Iterator[Int8Module]:
    """The experts of a layer under the names of the unquantized model: one by one, or all in one in 3-key models."""
    layer, stacked = source.layer, source.unfused == "stacked"
    numbers = source.experts
    for role, leaf in zip(ROLES, layer.naming.projections(), strict=True):
        rows = source.rows(role)
        shape = (rows, source.intermediate if role == "down" else layer.hidden)
        groups = [numbers] if stacked else [range(number, number + 1) for number in numbers]
        for group in groups:
            static = tuple(filter(None, (source.input_scale(role, expert) for expert in group)))
            yield Int8Module(
                f"{layer.moe}.{leaf}" if stacked else f"{layer.prefix}.{group[0]}.{leaf}",
                (layer.experts, *shape) if stacked else shape,
                tuple(source.weight(role, expert) for expert in group),
                tuple(source.scale(role, expert) for expert in group),
                static, (layer.experts,) if stacked else (),
            )  # fmt: skip


@dataclass(frozen=True, slots=True)
class ExpertSource:
    """The experts of one layer as pieces of the source, cut to what a rank has of them.

    Under tensor parallelism a rank's rows of gate and up are a byte range; its columns of down are a run of bytes in
    every row. The scale of down has an element for each row, and so is the same for all ranks.

    Attributes:
        layer: the layer.
        refs: byte range of every tensor of the source.
        unfused: layout of the unquantized model: ``per_expert``, or ``stacked`` in 3-key models.
        rank: the rank.
    """

    layer: MoELayer
    refs: Mapping[str, TensorRef]
    unfused: Layout = "per_expert"
    rank: Rank = WHOLE

    @property
    def experts(self) -> range:
        """Numbers of the rank's experts."""
        return self.rank.experts(self.layer.experts)

    @property
    def intermediate(self) -> int:
        """I, of the rank."""
        return len(self._columns)

    @property
    def _columns(self) -> range:
        return self.rank.intermediate(self.layer.intermediate)

    def rows(self, role: Role) -> int:
        """Output rows of a projection: I for gate and up, H for down."""
        return self.layer.hidden if role == "down" else self.intermediate

    def weight(self, role: Role, expert: int) -> Piece:
        """The codes of one projection of one expert: [I, H] or, for down, [H, I]."""
        stored = self.layer.projection(role, expert)
        name = stored.names.weight
        ref = self.refs[name]
        number, parts = stored.weight
        nbytes = ref.nbytes // parts
        piece = Piece(name, ref.file, ref.start + number * nbytes, nbytes)
        columns, hidden = self._columns, self.layer.hidden
        if len(columns) == self.layer.intermediate:
            return piece
        if role == "down":
            return piece._replace(
                start=piece.start + columns.start, nbytes=hidden * len(columns),
                run=len(columns), stride=self.layer.intermediate,
            )  # fmt: skip
        return piece._replace(start=piece.start + columns.start * hidden, nbytes=len(columns) * hidden)

    def scale(self, role: Role, expert: int) -> Piece:
        """The weight scale of one projection of one expert, as F32 for each of its rows."""
        stored = self.layer.projection(role, expert)
        name, per_row = stored.names.scale, stored.form.granularity == PER_CHANNEL
        part, parts = stored.scale
        piece = scale_piece(name, self.refs[name], self.rows(role), part=part, parts=parts, per_row=per_row)
        columns = self._columns
        if role == "down" or not per_row or len(columns) == self.layer.intermediate:
            return piece
        size = piece.nbytes // self.layer.intermediate
        return piece._replace(start=piece.start + columns.start * size, nbytes=len(columns) * size)

    def input_scale(self, role: Role, expert: int) -> Piece | None:
        """The static input scale of one projection of one expert, one element of F32; None where there is none."""
        name = self.layer.projection(role, expert).names.input_scale
        ref = self.refs.get(name)
        if ref is None:
            return None
        parts = prod(ref.shape)
        return scale_piece(name, ref, 1, part=expert if parts > 1 else 0, parts=parts, per_row=False)
