"""The stored modules: every module that has a weight, and its form.

The names of the tensors are those of Quark and compressed-tensors: ``<module>.weight``, ``.weight_scale``,
``.weight_zero_point``, ``.input_scale``, ``.input_zero_point``; Ascend names a zero point ``.weight_offset``. Experts
fused into one tensor have no ``.weight``: ``<experts>.gate_up_proj`` with ``<experts>.gate_up_proj_scale`` and
``_input_scale``.

How this stays fast. A large model has 100,000 tensors and 50,000 modules, in a handful of forms. One pass sorts the
tensors of each file into columns by the last part of their names: modules and types. Mostly the weights in int8 and
their scales come in the same order, so that comparing two lists pairs them. The header scanner gives equal types the
same object (``headers/scan.py``), so two tensors of one type have the same ``id``. A module's key is the tuple of the
ids of its types in all columns, ``id(None)`` where it lacks one. ``zip`` and ``map`` compute all keys at C speed; a
dict has one Form for each distinct key, which all modules of that key share. Later code compares and groups modules by
``id(form)``, and computes everything that depends on the form once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, repeat
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

    ``weight`` is [out, in]; for the experts of a layer in one tensor [E, out, in]; for a convolution [out, ...].
    """

    weight: TensorType
    scale: TensorType | None = None
    zero_point: TensorType | None = None
    input_scale: TensorType | None = None
    input_zero_point: TensorType | None = None
    offset: TensorType | None = None
    convolution: bool = False
    """Whether a weight [out, in, width] is that of a convolution, and not of the experts of a layer."""

    @property
    def tensors(self) -> tuple[TensorType | None, ...]:
        """The tensors, in the order of :class:`TensorNames`."""
        return self.weight, self.scale, self.zero_point, self.input_scale, self.input_zero_point, self.offset

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
    def is_convolution(self) -> bool:
        """True for the kernels of a convolution, which have three or more dimensions."""
        return self.convolution or len(self.weight.shape) > 3

    @property
    def may_be_convolution(self) -> bool:
        """True for a weight of three dimensions, unless its scale is of n linears [n, out, in]."""
        shape = self.weight.shape
        scale = () if self.scale is None else self.scale.shape
        return len(shape) == 3 and (shape[1] == 1 or scale not in (shape[:2], (*shape[:2], 1)))

    @property
    def granularity(self) -> Granularity | None:
        """Which parts of the weight share a scale; None when the scale has a shape that fits neither."""
        if self.scale is None or len(self.weight.shape) < 2:
            return None
        (*lead, out, _), shape = self.weight.shape, self.scale.shape
        leading = tuple(lead)
        if self.is_convolution:
            first, *others = self.weight.shape
            if shape and shape[0] == first and set(shape[1:]) <= {1} and len(shape) <= len(self.weight.shape):
                return PER_CHANNEL
            return PER_TENSOR if set(shape) <= {1} and len(shape) <= len(others) else None
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


_FIELDS: Final = {end.removeprefix("."): field for field, end in linear_names("")._asdict().items()}
"""Last part of the name of a tensor of a linear -> its field of a Form, in the order of the fields."""
_WEIGHT: Final = "weight"
_OUTPUT_ENDS: Final = tuple(output_companions(""))
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

    def with_convolutions(self, experts: Collection[str]) -> StoredModules:
        """The same modules; int8 weights of three dimensions are those of convolutions, unless they are of experts.

        A scale of each row, [n, out] for a weight [n, out, in], is one of n linears, since a convolution has one for
        each output channel.

        Args:
            experts: the modules of routed experts.
        """
        shared = {id(form): form for form in self.linears.values() if form.quantized and form.may_be_convolution}
        if not shared:
            return self
        convolutions = {key: form._replace(convolution=True) for key, form in shared.items()}
        linears = {
            module: form if module in experts else convolutions.get(id(form), form)
            for module, form in self.linears.items()
        }
        return replace(self, linears=linears)

    def has_bias(self, module: str) -> bool:
        """Whether a module has a bias."""
        return f"{module}{_BIAS}" in self.biases


def stored_modules(types: Mapping[str, TensorType], fused_leaves: Collection[str]) -> StoredModules:
    """Sort the tensors of a checkpoint into modules.

    Args:
        types: name -> dtype and shape of every tensor.
        fused_leaves: last parts of the names under which fused experts are stored, such as ``gate_up_proj``.
    """
    linears = _Linears()
    companions: list[str] = []
    vectors: list[str] = []
    unrecognised: list[str] = []
    plain: dict[str, TensorType] = {}
    for part in types.parts if isinstance(types, TensorTypes) else (types,):
        codes, floats = _Column([], []), _Column([], [])
        columns = {leaf: _Column([], []) for leaf in _FIELDS}
        for name, found in part.items():
            module, dot, leaf = name.rpartition(".")
            if leaf == _WEIGHT and dot:
                if len(found.shape) < 2:
                    vectors.append(name)
                    if found.dtype == "I8":
                        unrecognised.append(name)
                else:
                    modules, kinds = codes if found.dtype == "I8" else floats
                    modules.append(module)
                    kinds.append(found)
            elif leaf in columns and dot:
                modules, kinds = columns[leaf]
                modules.append(module)
                kinds.append(found)
            elif name.endswith(_COMPANIONS):
                companions.append(name)
            else:
                plain[name] = found
        linears.add(codes, floats, columns)
    companions += linears.complete()
    fused: dict[str, Form] = {}
    for name, found in plain.items():
        if len(found.shape) == 3 and name.rpartition(".")[2] in fused_leaves:
            of = fused_names(name)
            fused[name] = Form(
                weight=found,
                scale=types.get(of.scale),
                zero_point=types.get(of.zero_point),
                input_scale=types.get(of.input_scale),
                input_zero_point=types.get(of.input_zero_point),
                offset=types.get(of.offset),
            )
        elif found.dtype == "I8" and not name.endswith(ROTATION):
            unrecognised.append(name)
    if companions:
        unrecognised.extend(_orphans(companions, linears.forms, fused))
    return StoredModules(
        linears=linears.forms,
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


class _Column(NamedTuple):
    """The tensors of a file whose names end alike: their modules, and their types."""

    modules: list[str]
    types: list[TensorType]


class _Linears:
    """The linears of a checkpoint, which are added file by file.

    Attributes:
        forms: module -> form.
    """

    def __init__(self) -> None:
        self.forms: dict[str, Form] = {}
        self._shared: dict[tuple[str, ...], dict[tuple[int, ...], Form]] = {}
        self._elsewhere: dict[str, _Column] = {}

    def add(self, codes: _Column, floats: _Column, companions: Mapping[str, _Column]) -> None:
        """Add the linears of a file. Companions whose weights are not in it wait for :meth:`complete`.

        Args:
            codes: the weights in int8.
            floats: the other weights.
            companions: the companions by the last part of their names.
        """
        modules = codes.modules + floats.modules
        rows: dict[str, list[Any]] = {_FIELDS[_WEIGHT]: [*codes.types, *floats.types]}
        for leaf, (owners, found) in companions.items():
            if not found:
                continue
            row: list[TensorType | None] = [*found, *repeat(None, len(floats.modules))]
            if owners != codes.modules:  # mostly, the weights in int8 are those with a scale
                of_module = dict(zip(owners, found, strict=True))
                row = list(map(of_module.get, modules))
                if len(row) - row.count(None) < len(found):
                    here, elsewhere = set(modules), self._elsewhere.setdefault(leaf, _Column([], []))
                    names = [name for name in owners if name not in here]
                    elsewhere.modules.extend(names)
                    elsewhere.types.extend(map(of_module.__getitem__, names))
            rows[_FIELDS[leaf]] = row
        self.forms.update(zip(modules, self._forms(rows), strict=True))

    def _forms(self, rows: Mapping[str, Sequence[Any]]) -> list[Form]:
        """The forms of modules, of rows with the type that each module has for a field of a Form."""
        shared = self._shared.setdefault(tuple(rows), {})
        try:
            return list(map(shared.__getitem__, _keys(rows)))
        except KeyError:
            for key, found in dict(zip(_keys(rows), zip(*rows.values(), strict=True), strict=True)).items():
                shared.setdefault(key, Form(**dict(zip(rows, found, strict=True))))
            return list(map(shared.__getitem__, _keys(rows)))

    def complete(self) -> list[str]:
        """Add the companions that are in other files than their weights; gives the names of those without a weight."""
        alone = []
        for leaf, column in self._elsewhere.items():
            completed: dict[tuple[int, int], tuple[Form, Form]] = {}  # with what it was: its id stays that of no other
            for module, found in zip(*column, strict=True):
                form = self.forms.get(module)
                if form is None:
                    alone.append(f"{module}.{leaf}")
                    continue
                key = id(form), id(found)
                if key not in completed:
                    completed[key] = form, Form(**{**form._asdict(), _FIELDS[leaf]: found})
                self.forms[module] = completed[key][1]
        return alone


def _keys(rows: Mapping[str, Sequence[object]]) -> Iterator[tuple[int, ...]]:
    """A key for each module: types are shared objects, and slow to hash, so their ids are what counts."""
    return zip(*(map(id, row) for row in rows.values()), strict=True)


def _orphans(companions: Iterable[str], linears: Mapping[str, Form], fused: Mapping[str, Form]) -> list[str]:
    """Companions without a weight. The scale of a key-value cache belongs to its projection."""
    owned = {name for module in fused for name in fused_names(module)}
    return [
        name
        for name in companions
        if name not in owned
        and not name.endswith(ATTENTION_SCALES)
        and not (name.endswith(_OUTPUT_ENDS) and name.rpartition(".")[0] in linears)
    ]
