"""The MoE layers of a checkpoint: names, layout and size of their routed experts."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from quarkconv.experts.layer import Layout as Layout
from quarkconv.experts.layer import MoELayer as MoELayer
from quarkconv.experts.layer import Part as Part
from quarkconv.experts.naming import BY_PROJECTION, EXPERTS, NAMINGS, ROLES, ExpertNaming, Role
from quarkconv.findings import Finding, finding
from quarkconv.headers.safetensors import distinct
from quarkconv.scheme.stored import Form, StoredModules
from quarkconv.text import plural

_LAYER_NUMBER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_EXPERT_SUFFIX: Final = "." + EXPERTS
_MAX_DIGITS: Final = 9
"""Digits of the number of a layer or an expert, at most."""
MAX_EXPERTS: Final = 2**16
"""Experts of a layer, at most: tensors without bytes can claim any number."""


@dataclass(frozen=True, slots=True)
class Topology:
    """The MoE layers of a model, in order.

    Attributes:
        layers: the layers whose experts are complete.
        findings: missing experts, and shapes and names that do not fit.
        members: names of all modules that are routed experts, also of incomplete layers.
    """

    layers: tuple[MoELayer, ...]
    findings: tuple[Finding, ...]
    members: frozenset[str]


def expert_topology(stored: StoredModules, config_experts: int | None, hidden_layers: int | None) -> Topology:
    """Find the routed experts among the stored modules.

    Args:
        stored: the modules of the checkpoint.
        config_experts: number of routed experts that the config claims, if it does.
        hidden_layers: number of decoder layers that the config claims, to number the layers of ``mtp.layers``.
    """
    collected = _collect(stored)
    built = list(_layers(collected, hidden_layers))
    layers = [item for item in built if isinstance(item, MoELayer)]
    layers.sort(key=lambda layer: (layer.index, layer.prefix))
    findings = (
        *_misspelt(collected.misspelt),
        *(item for item in built if isinstance(item, Finding)),
        *_wrong_counts(layers, config_experts),
        *_mixed_geometry(layers),
    )
    return Topology(tuple(layers), findings, frozenset(collected.members))


def _layers(collected: _Collected, hidden_layers: int | None) -> Iterator[MoELayer | Finding]:
    """Each layer, or the reason why its experts do not make one."""
    position = 0
    for prefix, projections in collected.per_expert.items():
        if prefix in collected.single:
            yield finding(
                "layout-conflict",
                prefix,
                "The layer stores its experts twice: one by one, and all in one tensor",
                hint="remove one of the two: engines load one and drop the other",
            )
            continue
        layer = _per_expert_layer(prefix, _layer_index(prefix, hidden_layers, position), projections)
        position += isinstance(layer, MoELayer)
        yield layer
    for prefix, tensors in collected.single.items():
        if prefix not in collected.per_expert:
            layer = _single_tensor_layer(prefix, _layer_index(prefix, hidden_layers, position), tensors)
            position += isinstance(layer, MoELayer)
            yield layer


def _misspelt(modules: list[str]) -> Iterator[Finding]:
    if modules:
        yield finding(
            "tensor-unrecognised",
            modules[0],
            f"Experts with a number that no engine writes, such as 01: {plural(len(modules), 'module')}",
            hint="conversion treats them as ordinary linears; engines drop them",
            count=len(modules),
        )


def _wrong_counts(layers: list[MoELayer], config_experts: int | None) -> Iterator[Finding]:
    for layer in layers:
        if config_experts is not None and layer.experts != config_experts:
            yield finding(
                "expert-count",
                layer.prefix,
                f"The layer stores {layer.experts} experts, config.json has {config_experts}",
                hint="use the config.json that belongs to these weights",
            )


def _mixed_geometry(layers: list[MoELayer]) -> Iterator[Finding]:
    odd = [layer for layer in layers if layer.geometry != layers[0].geometry]
    if odd:
        yield finding(
            "layer-geometry",
            odd[0].prefix,
            f"{len(odd)} of {len(layers)} MoE layers differ from the first in number or size of experts: "
            f"{_geometry(odd[0])} instead of {_geometry(layers[0])}",
            count=len(odd),
        )


_PerExpert = dict[str, dict[str, dict[int, Form]]]  # module of the experts -> projection -> number -> form
_Single = dict[str, dict[tuple[ExpertNaming, str], Form]]


class _Collected(NamedTuple):
    """The modules that are routed experts, by the module that holds them, and those whose number is misspelt."""

    per_expert: _PerExpert
    single: _Single
    members: list[str]
    misspelt: list[str]


def _collect(stored: StoredModules) -> _Collected:
    """Group the modules that are routed experts by the module that holds them."""
    misspelt: list[str] = []
    last_head, owner = None, None
    owners: dict[str, tuple[dict[str, dict[int, Form]], int]] = {}  # module of an expert -> its layer, its number
    per_expert: _PerExpert = {}
    single: _Single = {}
    members: list[str] = []
    for module, form in stored.linears.items():
        head, _, leaf = module.rpartition(".")
        if leaf not in BY_PROJECTION:
            continue
        if len(form[0][1]) == 3:  # 3-key: the tensors of all experts directly below the MoE module
            prefix = head if head.endswith(_EXPERT_SUFFIX) else head + _EXPERT_SUFFIX
            single.setdefault(prefix, {})[BY_PROJECTION[leaf]] = form
            members.append(module)
            continue
        if head != last_head:  # the projections of an expert mostly follow one another
            last_head, owner = head, owners.get(head)
        if owner is None:
            prefix, _, number = head.rpartition(".")
            if not (prefix.endswith(_EXPERT_SUFFIX) and number.isascii() and number.isdecimal()):
                continue
            if number[0] == "0" != number or len(number) > _MAX_DIGITS:
                misspelt.append(module)
                continue
            owner = owners[head] = (per_expert.setdefault(prefix, {}), int(number))
        projections, expert = owner
        if leaf not in projections:
            projections[leaf] = {}
        projections[leaf][expert] = form
        members.append(module)
    for module, form in stored.fused.items():
        prefix, _, leaf = module.rpartition(".")
        for naming in NAMINGS:
            if prefix.endswith(_EXPERT_SUFFIX) and leaf in (naming.fused_gate_up, naming.fused_down):
                part = "gate_up" if leaf == naming.fused_gate_up else "down"
                single.setdefault(prefix, {})[naming, part] = form
                members.append(module)
    return _Collected(per_expert, single, members, misspelt)


def _per_expert_layer(prefix: str, index: int, projections: dict[str, dict[int, Form]]) -> MoELayer | Finding:
    namings = {BY_PROJECTION[name][0] for name in projections}
    if len(namings) > 1:
        names = " and ".join(sorted("/".join(naming.projections()) for naming in namings))
        return finding("layout-conflict", prefix, f"The layer names its experts in two ways: {names}")
    naming = namings.pop()
    numbers = set().union(*projections.values())
    experts = len(numbers)
    consecutive = range(experts)
    gaps = [number for number in consecutive if number not in numbers]
    lost = [
        f"{number}.{name}"
        for role, name in zip(ROLES, naming.projections(), strict=True)
        for number in sorted(numbers)
        if number not in projections.get(name, {})
    ]
    if gaps or lost:
        count = max(numbers) + 1 - experts if gaps else len(lost)
        what = "expert" if gaps else "projection"
        first = f"expert {gaps[0]}" if gaps else lost[0]
        return finding(
            "expert-missing",
            prefix,
            f"The layer has experts up to number {max(numbers)} and lacks {plural(count, what)}, first {first}",
            hint="download the checkpoint again; if it was published so, quantize it again",
            count=count,
        )
    names_of = dict(zip(ROLES, naming.projections(), strict=True))
    forms = {role: tuple(map(projections[name].__getitem__, consecutive)) for role, name in names_of.items()}
    intermediate, hidden = forms["gate"][0].weight.shape[0], forms["down"][0].weight.shape[0]
    shapes = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    kept = {role: frozenset(distinct(forms[role])) for role in ROLES}
    for role, name in names_of.items():
        wrong = {form for form in kept[role] if not _fits(form, shapes[role])}
        for number, form in enumerate(forms[role] if wrong else ()):
            if form in wrong:
                return _wrong_shape(f"{prefix}.{number}.{name}", shapes[role], form.weight.shape)
    implausible = _implausible(prefix, (experts, hidden, intermediate))
    if implausible is not None:
        return implausible
    moe = prefix.removesuffix(_EXPERT_SUFFIX)
    all_forms = frozenset().union(*kept.values())
    return MoELayer(index, prefix, moe, naming, "per_expert", experts, hidden, intermediate, forms, all_forms)


def _fits(form: Form, shape: tuple[int, int]) -> bool:
    """True for a projection of a shape. Formats that pack several codes into an element store fewer columns."""
    found = form.weight.shape
    if form.quantized or form.is_float:
        return found == shape
    return len(found) == 2 and found[0] == shape[0]


def _single_tensor_layer(prefix: str, index: int, tensors: dict[tuple[ExpertNaming, str], Form]) -> MoELayer | Finding:
    """A layer whose experts share tensors: stacked (gate, up, down) or fused (gate_up, down)."""
    naming = next(naming for naming in NAMINGS if any(owner is naming for owner, _ in tensors))
    parts = {part: form for (owner, part), form in tensors.items() if owner is naming}
    layout: Layout = "fused" if "gate_up" in parts else "stacked"
    needed = ("gate_up", "down") if layout == "fused" else ROLES
    lost = [part for part in needed if part not in parts]
    if lost:
        return finding("expert-missing", prefix, f"The layer has no {lost[0]} tensor")
    if len(parts) != len(tensors):
        return finding("layout-conflict", prefix, "The layer mixes names of two families")
    moe = prefix.removesuffix(_EXPERT_SUFFIX)
    experts, rows, hidden = parts[needed[0]].weight.shape
    intermediate = rows // 2 if layout == "fused" else rows
    shapes = {
        "gate_up": (experts, 2 * intermediate, hidden),
        "gate": (experts, intermediate, hidden),
        "up": (experts, intermediate, hidden),
        "down": (experts, hidden, intermediate),
    }
    for part, form in parts.items():
        if form.weight.shape != shapes[part]:
            return _wrong_shape(f"{prefix} ({part})", shapes[part], form.weight.shape)
    implausible = _implausible(prefix, (experts, hidden, intermediate))
    if implausible is not None:
        return implausible
    forms: dict[Role, tuple[Form, ...]] = {"down": (parts["down"],)}
    if layout == "fused":
        forms = {"gate": (parts["gate_up"],), "up": (), **forms}
    else:
        forms = {"gate": (parts["gate"],), "up": (parts["up"],), **forms}
    all_forms = frozenset(parts.values())
    return MoELayer(index, prefix, moe, naming, layout, experts, hidden, intermediate, forms, all_forms)


def _implausible(prefix: str, geometry: tuple[int, int, int]) -> Finding | None:
    """The finding for a layer without experts, with empty ones, or with more than any model has."""
    experts, hidden, intermediate = geometry
    if 0 < experts <= MAX_EXPERTS and hidden and intermediate:
        return None
    return finding(
        "expert-shape",
        prefix,
        f"The layer has {experts} experts, hidden {hidden}, intermediate {intermediate}; expected 1 to "
        f"{MAX_EXPERTS} experts, none of them empty",
        hint="these are not weights of a model",
    )


def _layer_index(prefix: str, hidden_layers: int | None, position: int) -> int:
    numbers = _LAYER_NUMBER.findall(prefix)
    if not numbers:
        return position
    index = int(numbers[-1][:_MAX_DIGITS])
    separate_mtp = prefix.startswith("mtp.") or ".mtp." in prefix
    return index + (hidden_layers or 0) if separate_mtp else index


def _geometry(layer: MoELayer) -> str:
    return f"{layer.experts} experts, hidden {layer.hidden}, intermediate {layer.intermediate}"


def _wrong_shape(subject: str, expected: tuple[int, ...], found: tuple[int, ...]) -> Finding:
    return finding(
        "expert-shape",
        subject,
        f"The projection has shape {list(found)}, the others of its layer need {list(expected)}",
        hint="download the checkpoint again; if it was published so, quantize it again",
    )
