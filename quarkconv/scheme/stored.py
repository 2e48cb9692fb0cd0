"""The stored modules: every module that has a weight, and its form.

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
from typing import Any, Final, NamedTuple

from quarkconv.dtypes import FLOAT_DTYPES, TensorType, TensorTypes
from quarkconv.scheme.companions import ATTENTION_SCALES, OUTPUT_SCALES, output_companions
from quarkconv.scheme.form import ROTATION, Form, fused_names, linear_names

_COMPANIONS: Final = ("_scale", "_zero_point", "_offset")
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
