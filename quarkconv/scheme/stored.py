"""What is stored: every module that has a weight, and in which form.

The names of the tensors are those of Quark and compressed-tensors: ``<module>.weight``, ``.weight_scale``,
``.weight_zero_point``, ``.input_scale``, ``.input_zero_point``. Experts fused into one tensor have no ``.weight``:
``<experts>.gate_up_proj`` with ``<experts>.gate_up_proj_scale`` and ``_input_scale``.

A large model has 50,000 modules in a handful of forms. A form is shared by all modules that are alike, so that whatever
is to be known about it is computed once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from operator import methodcaller
from typing import Final, Literal, NamedTuple

from quarkconv.headers.safetensors import FLOAT_DTYPES, Kind
from quarkconv.scheme.spec import PER_CHANNEL, PER_TENSOR

SCALE_DTYPES: Final = frozenset({"F32", "BF16", "F16"})
NARROW_DTYPES: Final = frozenset({"BF16", "F16"})
_WEIGHT: Final = ".weight"
_COMPANIONS: Final = ("_scale", "_zero_point")

Granularity = Literal["per_channel", "per_tensor"]


class Form(NamedTuple):
    """Dtypes and shapes of the tensors of a module; None for a tensor that it does not have.

    ``weight`` is [out, in]; for the experts of a layer in one tensor [E, out, in].
    """

    weight: Kind
    scale: Kind | None = None
    zero_point: Kind | None = None
    input_scale: Kind | None = None
    input_zero_point: Kind | None = None

    @property
    def companions(self) -> int:
        """How many tensors the module has beside its weight."""
        return 4 - self.count(None)

    @property
    def quantized(self) -> bool:
        """True when the weight is stored as int8 codes."""
        return self.weight[0] == "I8"

    @property
    def is_float(self) -> bool:
        """True when the weight is stored in float, and so is not quantized."""
        return self.weight[0] in FLOAT_DTYPES

    @property
    def granularity(self) -> Granularity | None:
        """Which parts of the weight share a scale; None when the scale has a shape that fits neither."""
        if self.scale is None or len(self.weight[1]) < 2:
            return None
        (*lead, out, _), shape = self.weight[1], self.scale[1]
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


def linear_names(module: str) -> TensorNames:
    """Names of the tensors of an ordinary linear."""
    weight = f"{module}.weight"
    return TensorNames(
        weight, f"{weight}_scale", f"{weight}_zero_point", f"{module}.input_scale", f"{module}.input_zero_point"
    )


def fused_names(module: str) -> TensorNames:
    """Names of the tensors of fused experts, such as ``model.layers.0.mlp.experts.gate_up_proj``."""
    return TensorNames(
        module, f"{module}_scale", f"{module}_zero_point", f"{module}_input_scale", f"{module}_input_zero_point"
    )


@dataclass(frozen=True, slots=True)
class StoredModules:
    """The modules of a checkpoint that have a weight.

    Attributes:
        linears: module -> form, for weights named ``<module>.weight`` of at least two dimensions.
        fused: module -> form, for three-dimensional weights without ``.weight``.
        unrecognised: tensors that hold codes or scales, and belong to no module.
    """

    linears: dict[str, Form]
    fused: dict[str, Form]
    unrecognised: tuple[str, ...]

    def __iter__(self) -> Iterator[tuple[str, Form]]:
        yield from self.linears.items()
        yield from self.fused.items()

    def count(self, *, quantized: bool) -> int:
        """How many linears are stored in int8, or in float."""
        forms = Counter(self.linears.values()) + Counter(self.fused.values())
        return sum(number for form, number in forms.items() if (form.quantized if quantized else form.is_float))


def stored_modules(kinds: Mapping[str, Kind], fused_leaves: Collection[str]) -> StoredModules:
    """Sort the tensors of a checkpoint into modules.

    Args:
        kinds: name -> dtype and shape of every tensor.
        fused_leaves: last parts of the names under which fused experts are stored, such as ``gate_up_proj``.
    """
    linears: dict[str, Form] = {}
    fused: dict[str, Form] = {}
    forms: dict[tuple[int, ...], tuple[Form, int]] = {}  # by identity: kinds are mostly shared objects, and costly to hash
    weights = [item for item in kinds.items() if item[0].endswith(_WEIGHT)]
    companions = [name for name in kinds if name.endswith(_COMPANIONS)]
    only_scales = all(map(methodcaller("endswith", ".weight_scale"), companions))
    owned = 0
    for name, kind in weights:
        dtype, shape = kind
        if len(shape) < 2:
            continue
        module = name[: -len(_WEIGHT)]
        if dtype in FLOAT_DTYPES:
            found: tuple[Kind | None, ...] = (kind,)
            key: tuple[int, ...] = (id(kind),)
        elif only_scales:
            scale = kinds.get(name + "_scale")
            found = (kind, scale)
            key = (id(kind), id(scale))
        else:
            found = tuple(map(kinds.get, linear_names(module)))
            key = tuple(map(id, found))
        known = forms.get(key)
        if known is None:
            form = Form(*found)  # type: ignore[arg-type]  # the first is a weight that is there
            known = forms[key] = form, form.companions
        linears[module], companions_here = known
        owned += companions_here
    others: list[str] = []
    if len(weights) + len(companions) != len(kinds):
        for name in (name for name in kinds if not name.endswith((_WEIGHT, *_COMPANIONS))):
            kind = kinds[name]
            if len(kind[1]) == 3 and name.rpartition(".")[2] in fused_leaves:
                fused[name] = form = Form(*map(kinds.get, fused_names(name)))  # type: ignore[arg-type]
                owned += form.companions
            elif kind[0] == "I8":
                others.append(name)
    if owned != len(companions):
        others.extend(_orphans(kinds, linears, fused))
    return StoredModules(linears, fused, tuple(others))


def _orphans(kinds: Mapping[str, Kind], linears: dict[str, Form], fused: dict[str, Form]) -> list[str]:
    """Scales and zero points that belong to no weight. A scale of a key-value cache belongs to its projection."""
    owned: set[str] = set()
    for module in linears:
        owned.update(linear_names(module))
        owned.update((f"{module}.output_scale", f"{module}.output_zero_point"))
    for module in fused:
        owned.update(fused_names(module))
    return [name for name in kinds if name.endswith(_COMPANIONS) and name not in owned]
