"""Stored form and declared scheme of every module, together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final, NamedTuple

from quarkconv.scheme.declared import DeclaredScheme, UnknownScheme
from quarkconv.scheme.form import Form
from quarkconv.scheme.spec import (
    INPUT_STATIC,
    PER_CHANNEL,
    PER_TENSOR,
    WEIGHT_PER_CHANNEL,
    WEIGHT_PER_TENSOR,
    ModuleScheme,
)
from quarkconv.scheme.stored import StoredModules

_WEIGHTS: Final = {PER_CHANNEL: WEIGHT_PER_CHANNEL, PER_TENSOR: WEIGHT_PER_TENSOR, None: None}


Groups = Mapping[tuple[Form, ModuleScheme], Sequence[str]]
"""(form, declared scheme) -> modules, in the order of the files."""


class ResolvedModules(NamedTuple):
    """The modules of a checkpoint, grouped by stored form and declared scheme: few groups, many modules.

    Attributes:
        groups: (form, declared scheme) -> modules, in the order of the files.
        default: the declared scheme of a module that no entry of the config matches.
        names: the INT8 schemes and their names.
        schemes: how many modules that are stored quantized have each effective scheme.
    """

    groups: dict[tuple[Form, ModuleScheme], list[str]]
    default: ModuleScheme
    names: Mapping[ModuleScheme, str]
    schemes: Counter[ModuleScheme]

    def only(self, modules: Collection[str]) -> Groups:
        """The groups of some modules, such as those that are no routed experts."""
        return {key: [*filter(modules.__contains__, names)] for key, names in self.groups.items()}

    def quantized(self) -> Iterator[tuple[Form, ModuleScheme, list[str]]]:
        """(form, effective scheme, modules) of the modules stored quantized, in int8 or otherwise."""
        for (form, declared), modules in self.groups.items():
            if form.quantized:
                yield form, _effective(form, declared, self.default), modules


def resolve_modules(stored: StoredModules, declared: DeclaredScheme | None) -> ResolvedModules:
    """Look up the declared scheme of every stored module. Without a config, or with an unknown one, all are float."""
    declared = declared or UnknownScheme("none")
    resolve = declared.resolver()
    # Forms and schemes are shared objects. Grouping by identity first hashes two integers a module, not their contents.
    alike: dict[tuple[int, int], tuple[Form, ModuleScheme, list[str]]] = {}
    for module, form in stored:
        scheme = resolve(module)
        key = (id(form), id(scheme))
        group = alike.get(key)
        if group is None:
            alike[key] = (form, scheme, [module])
        else:
            group[2].append(module)
    groups: dict[tuple[Form, ModuleScheme], list[str]] = {}
    for form, scheme, modules in alike.values():
        groups.setdefault((form, scheme), []).extend(modules)
    schemes: Counter[ModuleScheme] = Counter()
    for (form, scheme), names in groups.items():
        if form.quantized:
            schemes[_effective(form, scheme, declared.default)] += len(names)
    return ResolvedModules(groups, declared.default, declared.names, schemes)


def _effective(form: Form, declared: ModuleScheme, default: ModuleScheme) -> ModuleScheme:
    """The scheme of a module that is stored quantized.

    The weight's follows from its scale. The activation's is static when an input scale is stored, and otherwise the
    one that the config declares for the module or, where it excludes the module, for the rest. Neither is symmetric
    where the config declares otherwise.
    """
    claim = declared if declared.weight is not None else default
    weight = _WEIGHTS[form.granularity]
    if weight is not None and claim.weight is not None and not claim.weight.symmetric:
        weight = weight._replace(symmetric=False)
    activation = claim.activation
    if form.input_scale:
        asymmetric = activation is not None and not activation.dynamic and not activation.symmetric
        activation = INPUT_STATIC._replace(symmetric=not asymmetric)
    return ModuleScheme(weight, activation)
