"""The stored modules: every module that has a weight, and its form.

The names of the tensors are those of Quark and compressed-tensors: ``<module>.weight``, ``.weight_scale``,
``.weight_zero_point``, ``.input_scale``, ``.input_zero_point``; Ascend names a zero point ``.weight_offset``. Experts
fused into one tensor have no ``.weight``: ``<experts>.gate_up_proj`` with ``<experts>.gate_up_proj_scale`` and
``_input_scale``.

How this stays fast. A large model has 100,000 tensors and 50,000 modules, in a handful of forms. One pass sorts the
tensors into columns by the last part of their names, each from module to type. The header scanner gives equal types the
same object (``headers/scan.py``), so two tensors of one type have the same ``id``. A module's key is the tuple of the
ids of its types in all columns, ``id(None)`` where it lacks one. ``zip`` and ``map`` compute all keys at C speed; a
dict keeps one row of types for each distinct key, and one Form of it, which all modules of that key share. Later code
compares and groups modules by ``id(form)``, and computes everything that depends on the form once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Final, Literal, NamedTuple

from quarkconv.dtypes import FLOAT_DTYPES, TensorType, TensorTypes
from quarkconv.scheme.companions import ATTENTION_SCALES, OUTPUT_SCALES, output_companions
from quarkconv.scheme.spec import PER_CHANNEL, PER_TENSOR

SCALE_DTYPES: Final = frozenset({"F32", "BF16", "F16"})
NARROW_DTYPES: Final = frozenset({"BF16", "F16"})
_COMPANIONS: Final = ("_scale", "_zero_point", "_offset")
BLOCK_SCALE: Final = ".weight_scale_inv"
"""The scales of a weight that is quantized in blocks, such as 128 x 128."""
ROTATION: Final = "_rotation"
"""End of the name of the matrix that rotates the input or output of a module at run time."""

Granularity = Literal["per_channel", "per_tensor"]


class Form(NamedTuple):
    """Dtypes and shapes of the tensors of a module; None for a tensor that it does not have.

    ``weight`` is [out, in]; for the experts of a layer in one tensor [E, out, in].
    """

    weight: TensorType
    scale: TensorType | None = None
    zero_point: TensorType | None = None
    input_scale: TensorType | None = None
    input_zero_point: TensorType | None = None
    offset: TensorType | None = None

    @property
    def zero_points(self) -> tuple[TensorType | None, TensorType | None, TensorType | None]:
        """Those of the weight, of the input, and of the weight under Ascend's name."""
        return self.zero_point, self.input_zero_point, self.offset

    @property
    def quantized(self) -> bool:
        """True when the weight is stored as int8 codes."""
        return self.weight.dtype == "I8"

    @property
    def is_float(self) -> bool:
        """True when the weight is stored in float, and so is not quantized."""
        return self.weight.dtype in FLOAT_DTYPES

    @property
    def granularity(self) -> Granularity | None:
        """Which parts of the weight share a scale; None when the scale has a shape that fits neither."""
        if self.scale is None or len(self.weight.shape) < 2:
            return None
        (*lead, out, _), shape = self.weight.shape, self.scale.shape
        leading = tuple(lead)
        if shape in ((*leading, out), (*leading, out, 1)):
            return PER_CHANNEL
        if shape in (leading, (*leading, 1), (*leading, 1, 1)):
            return PER_TENSOR
        return None


class TensorNames(NamedTuple):
    """Names of the tensors of one module; a module need not have all of them."""

    weight: str
    scale: str
    zero_point: str
    input_scale: str
    input_zero_point: str
    offset: str

    def zero_points(self, form: Form) -> list[str]:
        """Names of the zero points that a module of this form has."""
        names = (self.zero_point, self.input_zero_point, self.offset)
        return [name for name, found in zip(names, form.zero_points, strict=True) if found is not None]


def linear_names(module: str) -> TensorNames:
    """Names of the tensors of an ordinary linear."""
    weight = f"{module}.weight"
    return TensorNames(
        weight,
        f"{weight}_scale",
        f"{weight}_zero_point",
        f"{module}.input_scale",
        f"{module}.input_zero_point",
        f"{weight}_offset",
    )


def fused_names(module: str) -> TensorNames:
    """Names of the tensors of fused experts, such as ``model.layers.0.mlp.experts.gate_up_proj``."""
    return TensorNames(
        module,
        f"{module}_scale",
        f"{module}_zero_point",
        f"{module}_input_scale",
        f"{module}_input_zero_point",
        f"{module}_offset",
    )


_ENDS: Final = linear_names("")
"""Ends of the names of the tensors of a linear, in the order of the fields of a Form."""
_WEIGHT: Final = _ENDS.weight
_BIAS: Final = ".bias"


@dataclass(frozen=True, slots=True)
class StoredModules:
    """The modules of a checkpoint that have a weight.

    Attributes:
        linears: module -> form, for weights named ``<module>.weight`` of at least two dimensions.
        fused: module -> form, for three-dimensional weights without ``.weight``.
        unrecognised: tensors with codes or scales that belong to no module.
        tensors: dtype and shape of every tensor.
        plain: names of the tensors that are neither weights nor companions of one, such as biases.
        output_scales: tensors that describe quantized outputs, such as scales of the key-value cache.
        biases: names of all biases.
        integer_biases: names of those that are not stored in float.
        vectors: names of the weights of one dimension, such as those of norms.
    """

    linears: dict[str, Form]
    fused: dict[str, Form]
    unrecognised: tuple[str, ...]
    tensors: Mapping[str, TensorType] = field(default_factory=dict)
    plain: tuple[str, ...] = ()
    output_scales: tuple[str, ...] = ()
    biases: frozenset[str] = frozenset()
    integer_biases: tuple[str, ...] = ()
    vectors: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[tuple[str, Form]]:
        return chain(self.linears.items(), self.fused.items())

    def has_bias(self, module: str) -> bool:
        """Whether a module has a bias."""
        return f"{module}{_BIAS}" in self.biases


def stored_modules(types: Mapping[str, TensorType], fused_leaves: Collection[str]) -> StoredModules:
    """Sort the tensors of a checkpoint into modules.

    Args:
        types: name -> dtype and shape of every tensor.
        fused_leaves: last parts of the names under which fused experts are stored, such as ``gate_up_proj``.
    """
    parts = types.parts if isinstance(types, TensorTypes) else (types,)
    modules: list[list[str]] = [[] for _ in parts]
    weights: list[TensorType | None] = []
    companions: list[str] = []
    vectors: list[str] = []
    unrecognised: list[str] = []
    plain: dict[str, TensorType] = {}
    for part, own in zip(parts, modules, strict=True):
        for name, found in part.items():
            if name.endswith(_WEIGHT):
                if len(found.shape) >= 2:
                    own.append(name.removesuffix(_WEIGHT))
                    weights.append(found)
                else:
                    vectors.append(name)
                    if found.dtype == "I8":
                        unrecognised.append(name)
            elif name.endswith(_COMPANIONS):
                companions.append(name)
            else:
                plain[name] = found
    rows = {"weight": weights, **dict(_companion_rows(parts, modules, companions, types))}
    linears = _forms(chain.from_iterable(modules), rows)
    fused: dict[str, Form] = {}
    for name, found in plain.items():
        if len(found.shape) == 3 and name.rpartition(".")[2] in fused_leaves:
            fused[name] = Form(found, *map(types.get, fused_names(name)[1:]))
        elif found.dtype == "I8" and not name.endswith(ROTATION):
            unrecognised.append(name)
    owned = sum(len(row) - row.count(None) for row in rows.values()) - len(weights)
    owned += sum(len(form) - 1 - form.count(None) for form in fused.values())
    if owned != len(companions):
        unrecognised.extend(_orphans(companions, linears, fused))
    return StoredModules(
        linears=linears,
        fused=fused,
        unrecognised=tuple(unrecognised),
        tensors=types,
        plain=tuple(plain),
        output_scales=tuple(name for name in chain(companions, plain) if name.endswith(OUTPUT_SCALES)),
        vectors=tuple(vectors),
        biases=frozenset(name for name in plain if name.endswith(_BIAS)),
        integer_biases=tuple(
            name for name, found in plain.items() if name.endswith(_BIAS) and found.dtype not in FLOAT_DTYPES
        ),
    )


def _companion_rows(
    parts: Sequence[Mapping[str, TensorType]],
    modules: Sequence[Sequence[str]],
    companions: Sequence[str],
    types: Mapping[str, TensorType],
) -> Iterator[tuple[str, list[TensorType | None]]]:
    """Each kind of companion that is stored: its field of a Form, and the type that each module has of it.

    Args:
        parts: the tensors, file by file.
        modules: the modules whose weights are in each part.
        companions: names of all companions.
        types: all tensors.
    """
    for companion, end in zip(Form._fields[1:], _ENDS[1:], strict=True):
        others = [name for name in companions if not name.endswith(end)]
        stored = len(companions) - len(others)
        if stored:
            row = [part.get(f"{module}{end}") for part, own in zip(parts, modules, strict=True) for module in own]
            if len(row) - row.count(None) < stored:  # some are in other files than their weights
                row = [types.get(f"{module}{end}") for module in chain.from_iterable(modules)]
            yield companion, row
        companions = others


def _forms(modules: Iterable[str], rows: Mapping[str, Sequence[TensorType | None]]) -> dict[str, Form]:
    """Module -> form, of rows with the type that each module has for a field of a Form."""
    # Types are shared objects, and slow to hash: the ids of a module's types are its key.
    keys = list(zip(*(map(id, row) for row in rows.values()), strict=True))
    types: dict[int, Any] = {id(found): found for row in rows.values() for found in row}
    forms = {key: Form(**dict(zip(rows, map(types.__getitem__, key), strict=True))) for key in set(keys)}
    return dict(zip(modules, map(forms.__getitem__, keys), strict=True))


def _orphans(companions: list[str], linears: dict[str, Form], fused: dict[str, Form]) -> list[str]:
    """Companions without a weight. The scale of a key-value cache belongs to its projection."""
    owned: set[str] = set()
    for module in linears:
        owned.update(linear_names(module))
        owned.update(output_companions(module))
    for module in fused:
        owned.update(fused_names(module))
    return [name for name in companions if not name.endswith(ATTENTION_SCALES) and name not in owned]
