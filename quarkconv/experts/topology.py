"""The MoE layers of a checkpoint: names, layout and size of their routed experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Set
from dataclasses import replace
from itertools import chain, filterfalse
from typing import Final, NamedTuple

from quarkconv.experts.config import STACKS, stack_of
from quarkconv.experts.family import FamilyOf
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.layouts import per_expert_layer, single_tensor_layer
from quarkconv.experts.naming import EXPERT_MODULES, EXPERTS, LEAVES, NAMINGS, PAIRED, STACKED, ExpertNaming
from quarkconv.experts.unread import names_not_understood, unread_findings
from quarkconv.findings import Finding, FindingsAbout, finding
from quarkconv.scheme.form import Form
from quarkconv.scheme.stored import StoredModules
from quarkconv.text import plural

_LAYER_NUMBER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_EXPERT_SUFFIX: Final = "." + EXPERTS
_STACK_ORDER: Final = tuple(STACKS)
_ROUTERS: Final = ("gate", "router")
"""Modules of routers, whatever the family calls its own."""
_MAX_DIGITS: Final = 9
"""Digits of the number of a layer or an expert, at most."""


class Members(Set[str]):
    """The names of the modules that are routed experts: all but a few hundred others of the 50,000 of a large model.

    Those others are what is kept, since a set of all experts takes as long to build as a tenth of the headers to parse.
    """

    def __init__(self, stored: StoredModules, others: Collection[str]) -> None:
        self._stored = stored
        self._others = frozenset(others)

    def __contains__(self, name: object) -> bool:
        return name not in self._others and (name in self._stored.linears or name in self._stored.fused)

    def __iter__(self) -> Iterator[str]:
        return (name for name, _ in self._stored if name not in self._others)

    def __len__(self) -> int:
        return len(self._stored.linears) + len(self._stored.fused) - len(self._others)

    @classmethod
    def _from_iterable(cls, names: Iterable[str]) -> frozenset[str]:  # type: ignore[override]
        """The type of unions and differences."""
        return frozenset(names)


class Topology(NamedTuple):
    """The MoE layers of a model, in order.

    Attributes:
        layers: the layers whose experts are complete.
        findings: missing experts, and shapes and names that do not fit.
        members: names of all modules that are routed experts, also of incomplete layers.
        others: names of the modules that are no routed experts, or are those of no layer.
        unread: modules and tensors of experts that make no layer: under unknown names, or in an unknown layout.
    """

    layers: tuple[MoELayer, ...]
    findings: tuple[Finding, ...]
    members: Set[str]
    others: frozenset[str]
    unread: frozenset[str] = frozenset()


def expert_topology(
    stored: StoredModules,
    config_experts: int | None,
    hidden_layers: int | None,
    family: FamilyOf = lambda _: None,
    experts_of: Callable[[str, bool], int | None] | None = None,
) -> Topology:
    """Find the routed experts among the stored modules.

    Args:
        stored: the modules of the checkpoint.
        config_experts: number of routed experts that the config claims, if it does.
        hidden_layers: number of decoder layers that the config claims, to number the layers of ``mtp.layers``.
        family: gives the family of models that a module is of, None where it is not known.
        experts_of: gives the number of routed experts that the config claims for the stack of layers of a module, in a
            layer that ranks divide, or in another; by default ``config_experts``.
    """
    collected = _collect(stored)
    built = list(_layers(collected, stored, hidden_layers, family))
    layers = [item for item in built if isinstance(item, MoELayer)]
    layers.sort(key=lambda layer: (_stack(layer.prefix), layer.index, layer.prefix))
    members = Members(stored, collected.others)
    misspelt = collected.misspelt if members else []
    others = [*filterfalse(frozenset(misspelt).__contains__, collected.others)]
    known = Members(stored, others)
    unknown = names_not_understood(stored, others, known, config_experts)
    findings = (
        *_misspelt(misspelt),
        *(item for item in built if isinstance(item, Finding)),
        *_wrong_counts(layers, experts_of or (lambda *_: config_experts)),
        *_mixed_geometry(layers),
        *unread_findings(stored, unknown, known, config_experts),
    )
    if unknown:
        layers = [replace(layer, beside=_first_inside(layer.prefix, unknown)) for layer in layers]
    if of_routers := dict(_beside_routers(layers, stored, family)):
        layers = [replace(layer, beside_router=of_routers.get(layer.prefix, "")) for layer in layers]
    unread = frozenset(unknown)
    if len(layers) < len(built):
        unread |= frozenset(members).difference(*(layer.module_names for layer in layers))
    return Topology(tuple(layers), findings, members, unread.union(collected.others), unread)


def _layers(
    collected: _Collected,
    stored: StoredModules,
    hidden_layers: int | None,
    family: FamilyOf,
) -> Iterator[MoELayer | Finding]:
    """Each layer, or the reason why its experts do not make one."""
    position = 0
    for prefix, projections in collected.per_expert.items():
        if prefix in collected.single:
            yield finding(
                "layout-conflict",
                prefix,
                "The layer stores its experts twice: one by one and in one tensor",
                hint="remove one copy: engines load one and drop the other",
            )
            continue
        index = _layer_index(prefix, hidden_layers, position)
        layer = per_expert_layer(prefix, index, projections, stored, family(prefix))
        position += isinstance(layer, MoELayer)
        yield layer
    for prefix, tensors in collected.single.items():
        if prefix not in collected.per_expert:
            index = _layer_index(prefix, hidden_layers, position)
            layer = single_tensor_layer(prefix, index, tensors, stored, family(prefix))
            position += isinstance(layer, MoELayer)
            yield layer


def _first_inside(prefix: str, names: list[str]) -> str:
    """The first of some names that is below a module; empty without any."""
    return next((name for name in names if name.startswith(f"{prefix}.")), "")


def _beside_routers(layers: list[MoELayer], stored: StoredModules, family: FamilyOf) -> Iterator[tuple[str, str]]:
    """Module of experts -> a tensor beside the router's that the family does not have, where the family is known."""
    owners: dict[str, str] = {}  # module of the router, or the MoE module -> module of the experts
    known: set[str] = set()
    for layer in layers:
        row = family(layer.prefix)
        if row is None:
            continue
        keys = [key for field in row.tensors for key in (field if isinstance(field, tuple) else ())]
        known.update(f"{layer.router_module}.{key}" for key in keys)
        if not layer.moe.rpartition(".")[2].isdecimal():  # else the experts lie directly in the decoder layer
            owners[layer.router_module] = layer.prefix
        routers = {*_ROUTERS, *(key.rpartition(".")[0] for key in keys if "." in key)}
        owners.update((f"{layer.router_module}.{router}", layer.prefix) for router in routers)
    for name in chain(stored.plain, stored.vectors, stored.unrecognised):
        prefix = owners.get(name.rpartition(".")[0])
        if prefix is not None and name not in known:
            yield prefix, name


def _misspelt(modules: list[str]) -> Iterator[Finding]:
    yield from FindingsAbout(
        "tensor-unrecognised",
        modules,
        f"{plural(len(modules), 'module')} with an expert number that no engine writes, such as 01",
        hint="conversion treats them as ordinary linears; engines drop them",
    )


def _wrong_counts(layers: list[MoELayer], experts_of: Callable[[str, bool], int | None]) -> Iterator[Finding]:
    for layer in layers:
        claimed = experts_of(layer.prefix, layer.quantized)
        if claimed is not None and layer.experts != claimed:
            yield finding(
                "expert-count",
                layer.prefix,
                f"The layer stores {layer.experts} experts, but config.json has {claimed}",
                hint="use the config.json that belongs to these weights",
            )


def _mixed_geometry(layers: list[MoELayer]) -> Iterator[Finding]:
    odd = [layer for layer in layers if layer.geometry != layers[0].geometry]
    if odd:
        yield finding(
            "layer-geometry",
            odd[0].prefix,
            f"{len(odd)} of {len(layers)} MoE layers with experts that differ in number or size from the first's: "
            f"{_geometry(odd[0])} instead of {_geometry(layers[0])}",
            count=len(odd),
        )


_PerExpert = dict[str, dict[str, dict[int, Form]]]  # module of the experts -> projection -> number -> form
_Single = dict[str, dict[tuple[ExpertNaming, str], Form]]


class _Collected(NamedTuple):
    """The modules that are routed experts, by the module that holds them; the others; of these the misspelt numbers."""

    per_expert: _PerExpert
    single: _Single
    others: list[str]
    misspelt: list[str]


def _collect(stored: StoredModules) -> _Collected:
    """Group the modules that are routed experts by the module that holds them."""
    misspelt: list[str] = []
    per_expert: _PerExpert = {}
    single: _Single = {}
    others: list[str] = []
    forms = {id(form): form for form in stored.linears.values()}  # each is the form of many modules
    single_tensors = {key for key, form in forms.items() if len(form.weight.shape) == 3}
    numbers: dict[str, int | None] = {}  # the same for all layers
    last_head, projections, expert, is_misspelt = None, None, 0, False
    for module, form in stored.linears.items():
        head, _, leaf = module.rpartition(".")
        if leaf not in LEAVES:
            if leaf in PAIRED and id(form) in single_tensors:
                single.setdefault(head + _EXPERT_SUFFIX, {})[NAMINGS[0], PAIRED[leaf]] = form
            else:
                others.append(module)
            continue
        if single_tensors and id(form) in single_tensors:  # 3-key: the tensors of all experts, below the MoE module
            if leaf in STACKED:
                prefix = head if head.endswith(_EXPERT_SUFFIX) else head + _EXPERT_SUFFIX
                single.setdefault(prefix, {})[STACKED[leaf]] = form
            else:
                others.append(module)
            continue
        if head != last_head:  # the projections of an expert mostly follow one another
            last_head, projections, is_misspelt = head, None, False
            prefix, _, digits = head.rpartition(".")
            if digits not in numbers:
                numbers[digits] = _number(digits)
            number = numbers[digits]
            if number is not None and prefix.endswith(EXPERT_MODULES):
                is_misspelt = number < 0
                if not is_misspelt:
                    projections, expert = per_expert.setdefault(prefix, {}), number
        if projections is not None:
            of_leaf = projections.get(leaf)
            if of_leaf is None:
                of_leaf = projections[leaf] = {}
            of_leaf[expert] = form
        else:
            others.append(module)
            if is_misspelt:
                misspelt.append(module)
    for module, form in stored.fused.items():
        prefix, _, leaf = module.rpartition(".")
        is_member = False
        for naming in NAMINGS:
            if prefix.endswith(_EXPERT_SUFFIX) and leaf in (naming.fused_gate_up, naming.fused_down):
                part = "gate_up" if leaf == naming.fused_gate_up else "down"
                single.setdefault(prefix, {})[naming, part] = form
                is_member = True
        if not is_member:
            others.append(module)
    return _Collected(per_expert, single, others, misspelt)


def _number(digits: str) -> int | None:
    """The number of an expert; -1 for one in a form that no engine writes, None for another name."""
    if not (digits.isascii() and digits.isdecimal()):
        return None
    return -1 if digits[0] == "0" != digits or len(digits) > _MAX_DIGITS else int(digits)


def _layer_index(prefix: str, hidden_layers: int | None, position: int) -> int:
    numbers = _LAYER_NUMBER.findall(prefix)
    if not numbers:
        return position
    index = int(numbers[-1][:_MAX_DIGITS])
    separate_mtp = prefix.startswith("mtp.") or ".mtp." in prefix
    return index + (hidden_layers or 0) if separate_mtp else index


def _stack(prefix: str) -> int:
    """Position of the stack of layers of a module: the language model's comes first, one of another name last."""
    stack = stack_of(prefix)
    return 0 if not stack else _STACK_ORDER.index(stack) if stack in _STACK_ORDER else len(_STACK_ORDER)


def _geometry(layer: MoELayer) -> str:
    return f"{layer.experts} experts, hidden {layer.hidden}, intermediate {layer.intermediate}"
