"""Pieces of the int8 modules of a source, in any layout.

A target requests the gate rows of expert 3 and gets byte ranges, whether they are a tensor of their own, a part of a
tensor of all experts (3-key), or the upper half of a fused one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import starmap
from math import prod
from typing import NamedTuple

from quarkconv.experts.config import ModelConfig
from quarkconv.experts.layer import Layout, MoELayer, Part
from quarkconv.experts.naming import ExpertNaming, Role
from quarkconv.experts.ranks import WHOLE, Rank
from quarkconv.headers.safetensors import TensorRef
from quarkconv.plan.pieces import Check, Columns, Copy, MoEGeometry, OutputTensor, Rows, Scale, Weights, f32_rows
from quarkconv.scheme.form import BLOCK_SCALE, Form, fused_names, linear_names
from quarkconv.scheme.resolved import ResolvedModules
from quarkconv.scheme.scale_values import SIGNED_ZEROS
from quarkconv.scheme.spec import PER_CHANNEL


def part_of(name: str, ref: TensorRef, part: Part) -> Copy:
    """One of several equal parts of a tensor."""
    number, parts = part
    nbytes = ref.nbytes // parts
    return Copy(name, ref.file, ref.start + number * nbytes, nbytes)


class Int8Module(NamedTuple):
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
    codes: tuple[Copy, ...]
    scales: tuple[Scale, ...]
    input_scales: tuple[Scale, ...] = ()
    input_shape: tuple[int, ...] = ()


def dequantized(module: Int8Module) -> OutputTensor:
    """The weight of a module as BF16: each code times its scale in F32, rounded once."""
    pieces = tuple(starmap(Weights, zip(module.codes, module.scales, strict=True)))
    return OutputTensor(linear_names(module.name).weight, "BF16", module.shape, pieces)


def fp8_tensors(name: str, form: Form, strategy: str, refs: Mapping[str, TensorRef]) -> Iterator[OutputTensor]:
    """A linear in FP8, in the form of compressed-tensors: weight_scale F32 and input_scale F32 [1].

    The scale of the weight is [out, 1], [1], or that of its blocks [ceil(out / 128), ceil(in / 128)].
    """
    names = linear_names(name)
    stored = names.scale if names.scale in refs else f"{name}{BLOCK_SCALE}"
    weight, scale = refs[names.weight], refs[stored]
    yield OutputTensor(names.weight, weight.dtype, weight.shape, (Copy.whole(names.weight, weight),))
    shape = {"channel": (weight.shape[0], 1), "tensor": (1,)}.get(strategy, scale.shape)
    yield OutputTensor(names.scale, "F32", shape, (f32_rows(Copy.whole(stored, scale), scale.dtype),))
    if form.input_scale is not None:
        static = refs[names.input_scale]
        source = Copy.whole(names.input_scale, static)
        yield OutputTensor(names.input_scale, "F32", (1,), (f32_rows(source, static.dtype),))


def linear_module(name: str, form: Form, refs: Mapping[str, TensorRef]) -> Int8Module:
    """A linear, or a convolution, of the source that keeps its name and shape."""
    names = linear_names(name)
    *lead, rows, _ = form.weight.shape
    if form.is_convolution:
        lead, rows = [], form.weight.shape[0]
    parts = [Part(number, prod(lead)) for number in range(prod(lead))]
    weight, scale = refs[names.weight], refs[names.scale]
    repeat = 1 if form.granularity == PER_CHANNEL else rows
    static = refs[names.input_scale] if form.input_scale else None
    return Int8Module(
        name=name,
        shape=form.weight.shape,
        codes=tuple(part_of(names.weight, weight, part) for part in parts),
        scales=tuple(f32_rows(part_of(names.scale, scale, part), scale.dtype, repeat) for part in parts),
        input_scales=(f32_rows(Copy.whole(names.input_scale, static), static.dtype),) if static else (),
        input_shape=form.input_scale.shape if form.input_scale else (),
    )


def expert_modules(source: ExpertSource) -> Iterator[Int8Module]:
    """The experts of a layer under the names of the unquantized model: one by one, or all in one in 3-key models."""
    layer, stacked = source.layer, source.unfused == "stacked"
    experts = range(layer.experts)
    shapes = {"down": (layer.hidden, layer.intermediate)}
    for leaf, (role, *others) in layer.leaves():
        if others:  # gate and up of an expert in one projection, whose rows stay in their order
            for expert, form in enumerate(layer.forms[role]):
                yield linear_module(f"{layer.prefix}.{expert}.{leaf}", form, source.refs)
            continue
        shape = shapes.get(role, (layer.intermediate, layer.hidden))
        for group in [experts] if stacked else [range(expert, expert + 1) for expert in experts]:
            projections = [source.whole(role, expert) for expert in group]
            yield Int8Module(
                name=f"{layer.moe}.{leaf}" if stacked else f"{layer.prefix}.{group[0]}.{leaf}",
                shape=(layer.experts, *shape) if stacked else shape,
                codes=tuple(projection.codes for projection in projections),
                scales=tuple(projection.scale for projection in projections),
                input_scales=tuple(item.input_scale for item in projections if item.input_scale is not None),
                input_shape=(layer.experts,) if stacked else (),
            )


def zero_checks(resolved: ResolvedModules, fused: Collection[str], refs: Mapping[str, TensorRef]) -> Iterator[Check]:
    """The condition that the stored zero points of int8 modules are zero.

    Args:
        resolved: the modules.
        fused: those with fused experts.
        refs: byte range of every tensor of the source.
    """
    for form, _, modules in resolved.quantized():
        if not any(form.zero_points):
            continue
        for module in modules:
            names = fused_names(module) if module in fused else linear_names(module)
            for name in names.zero_points(form):
                dtype = refs[name].dtype
                yield Check("zero", Copy.whole(name, refs[name]), dtype=dtype if dtype in SIGNED_ZEROS else "")


def geometry_of(layers: Sequence[MoELayer], config: ModelConfig, rank: Rank) -> MoEGeometry | None:
    """E, k, H and I of converted layers, for a rank; None without any."""
    if not layers:
        return None
    return MoEGeometry(
        layers=tuple(layer.index for layer in layers),
        prefixes=tuple(layer.prefix for layer in layers),
        experts=len(rank.experts(layers[0].experts)),
        top_k=config.top_k,
        hidden_size=layers[0].hidden,
        intermediate_size=len(rank.intermediate(layers[0].intermediate)),
        activation_function=config.activation,
    )


class WholeProjection(NamedTuple):
    """A projection of an expert as pieces: its codes, the F32 scales of its rows, and its static input scale."""

    codes: Copy
    scale: Scale
    input_scale: Scale | None


class ProjectionPart(NamedTuple):
    """A rank's part of a projection."""

    codes: Copy | Columns
    scale: Scale
    input_scale: Scale | None


class ExpertSource(NamedTuple):
    """The experts of one layer as pieces of the source, cut to a rank's part.

    Under tensor parallelism a rank's rows of gate and up are a byte range; its columns of down are a run of bytes in
    every row. The scale of down has an element for each row, and so is the same for all ranks.

    Attributes:
        layer: the layer.
        refs: byte range of every tensor of the source.
        unfused: layout of the unquantized model: ``per_expert``, or ``stacked`` in 3-key models.
        rank: the rank.
        engine_naming: the names by which engines route fused tensors; None where these are the source's.
    """

    layer: MoELayer
    refs: Mapping[str, TensorRef]
    unfused: Layout = "per_expert"
    rank: Rank = WHOLE
    engine_naming: ExpertNaming | None = None

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

    def whole(self, role: Role, expert: int) -> WholeProjection:
        """One projection of one expert: codes [I, H] or, for down, [H, I], of all ranks."""
        layer, stored = self.layer, self.layer.projection(role, expert)
        names, refs = stored.names, self.refs
        scale = refs[names.scale]
        rows = layer.hidden if role == "down" else layer.intermediate
        repeat = 1 if stored.form.granularity == PER_CHANNEL else rows
        return WholeProjection(
            part_of(names.weight, refs[names.weight], stored.weight),
            f32_rows(part_of(names.scale, scale, stored.scale), scale.dtype, repeat),
            None if stored.form.input_scale is None else self._input_scale(names.input_scale, expert),
        )

    def part(self, role: Role, expert: int) -> ProjectionPart:
        """The rank's part of a projection of one of its experts."""
        codes, scale, input_scale = self.whole(role, expert)
        columns, whole, hidden = self._columns, self.layer.intermediate, self.layer.hidden
        if len(columns) == whole:
            return ProjectionPart(codes, scale, input_scale)
        if role == "down":
            span = (hidden - 1) * whole + len(columns)
            cut = codes._replace(start=codes.start + columns.start, nbytes=span)
            return ProjectionPart(Columns(cut, len(columns), whole), scale, input_scale)
        return ProjectionPart(_rows_of(codes, columns, whole), _scale_of(scale, columns, whole), input_scale)

    def _input_scale(self, name: str, expert: int) -> Scale:
        ref = self.refs[name]
        parts = prod(ref.shape)
        return f32_rows(part_of(name, ref, Part(expert if parts > 1 else 0, parts)), ref.dtype)


def _rows_of(source: Copy, rows: range, of: int) -> Copy:
    """Some of the ``of`` rows of a range."""
    row = source.nbytes // of
    return source._replace(start=source.start + rows.start * row, nbytes=len(rows) * row)


def _scale_of(scale: Scale, rows: range, of: int) -> Scale:
    """The scales of some of ``of`` rows; one that all rows share is repeated less often."""
    match scale:
        case Copy():
            return _rows_of(scale, rows, of)
        case Rows(source, widen, 1):
            return Rows(_rows_of(source, rows, of), widen, 1)
        case Rows(source, widen, _):
            return Rows(source, widen, len(rows))
