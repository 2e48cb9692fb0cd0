"""The MoE layers of a checkpoint: names, layout and size of their routed experts."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Final, NamedTuple

from quarkconv.experts.config import STACKS
from quarkconv.experts.family import Family
from quarkconv.experts.layer import Layout as Layout
from quarkconv.experts.layer import MoELayer as MoELayer
from quarkconv.experts.layer import Part as Part
from quarkconv.experts.naming import EXPERT_MODULES, EXPERTS, LEAVES, NAMINGS, ROLES, STACKED, ExpertNaming, Role
from quarkconv.findings import Finding, finding
from quarkconv.headers.safetensors import distinct
from quarkconv.scheme.stored import Form, StoredModules
from quarkconv.text import plural

_LAYER_NUMBER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_EXPERT_SUFFIX: Final = "." + EXPERTS
_INSIDE: Final = f".{EXPERTS}."
_STACK_ORDER: Final = tuple(STACKS)
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


def expert_topology(
    stored: StoredModules,
    config_experts: int | None,
    hidden_layers: int | None,
    family: Callable[[str], Family | None] = lambda _: None,
    experts_of: Callable[[str], int | None] | None = None,
) -> Topology:
    """Find the routed experts among the stored modules.

    Args:
        stored: the modules of the checkpoint.
        config_experts: number of routed experts that the config claims, if it does.
        hidden_layers: number of decoder layers that the config claims, to number the layers of ``mtp.layers``.
        family: gives the family of models that a module is of, None where it is not known.
        experts_of: gives the number of routed experts that the config claims for the stack of layers of a module; by
            default ``config_experts``.
    """
    collected = _collect(stored)
    built = list(_layers(collected, stored, hidden_layers, family))
    layers = [item for item in built if isinstance(item, MoELayer)]
    layers.sort(key=lambda layer: (_stack(layer.prefix), layer.index, layer.prefix))
    members = frozenset(collected.members)
    known = members.union(collected.misspelt) if collected.misspelt else members
    findings = (
        *_misspelt(collected.misspelt),
        *(item for item in built if isinstance(item, Finding)),
        *_wrong_counts(layers, experts_of or (lambda _: config_experts)),
        *_mixed_geometry(layers),
        *_not_understood(stored, known, config_experts),
    )
    return Topology(tuple(layers), findings, members)


def _layers(
    collected: _Collected,
    stored: StoredModules,
    hidden_layers: int | None,
    family: Callable[[str], Family | None],
) -> Iterator[MoELayer | Finding]:
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
        index = _layer_index(prefix, hidden_layers, position)
        layer = _per_expert_layer(prefix, index, projections, stored, family(prefix))
        position += isinstance(layer, MoELayer)
        yield layer
    for prefix, tensors in collected.single.items():
        if prefix not in collected.per_expert:
            index = _layer_index(prefix, hidden_layers, position)
            layer = _single_tensor_layer(prefix, index, tensors, family(prefix))
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


def _not_understood(stored: StoredModules, known: frozenset[str], config_experts: int | None) -> Iterator[Finding]:
    """Experts with unknown names, and experts that config.json declares without stored tensors."""
    others = [module for module in stored.linears if module not in known]
    names = [module for module in others if _INSIDE in module]
    names += [
        name
        for name in stored.plain
        if (_INSIDE in name or name.endswith(_EXPERT_SUFFIX))
        and known.isdisjoint((name, name.rpartition(".")[0], name.removesuffix("_bias")))
    ]
    if known and names:
        yield finding(
            "tensor-unrecognised",
            names[0],
            f"Experts under names that are not understood: {plural(len(names), 'tensor')}, {_examples(names)}",
            hint="conversion copies them as they are; engines may drop them",
            count=len(names),
        )
    elif names:
        yield finding(
            "experts-not-understood",
            names[0],
            f"The names of the experts are not understood: {plural(len(names), 'tensor')}, {_examples(names)}",
            hint="quarkconv cannot convert tensors of unknown meaning",
            count=len(names),
        )
    elif not known and config_experts is not None and config_experts > 1:
        yield finding(
            "experts-not-understood",
            "config.json",
            f"config.json has {config_experts} routed experts per layer, and no tensor has the name of one",
            hint="no conversion knows which tensors are the experts",
        )


def _examples(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _wrong_counts(layers: list[MoELayer], experts_of: Callable[[str], int | None]) -> Iterator[Finding]:
    for layer in layers:
        claimed = experts_of(layer.prefix)
        if claimed is not None and layer.experts != claimed:
            yield finding(
                "expert-count",
                layer.prefix,
                f"The layer stores {layer.experts} experts, config.json has {claimed}",
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
    single_tensors = {id(form) for form in distinct(stored.linears.values()) if len(form.weight.shape) == 3}
    for module, form in stored.linears.items():
        head, _, leaf = module.rpartition(".")
        if leaf not in LEAVES:
            continue
        if (
            single_tensors and id(form) in single_tensors
        ):  # 3-key: the tensors of all experts directly below the MoE module
            if leaf in STACKED:
                prefix = head if head.endswith(_EXPERT_SUFFIX) else head + _EXPERT_SUFFIX
                single.setdefault(prefix, {})[STACKED[leaf]] = form
                members.append(module)
            continue
        if head != last_head:  # the projections of an expert mostly follow one another
            last_head, owner = head, owners.get(head)
        if owner is None:
            prefix, _, number = head.rpartition(".")
            if not (prefix.endswith(EXPERT_MODULES) and number.isascii() and number.isdecimal()):
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


def _per_expert_layer(
    prefix: str, index: int, projections: dict[str, dict[int, Form]], stored: StoredModules, family: Family | None
) -> MoELayer | Finding:
    naming = _naming(prefix, frozenset(projections))
    if isinstance(naming, Finding):
        return naming
    joined = naming.joined is not None and naming.joined in projections
    gated = joined or naming.gate in projections or (family is not None and family.gated)
    leaves: dict[Role, str] = dict(zip(ROLES, naming.projections(), strict=True))
    if naming.joined is not None and joined:
        leaves = {"gate": naming.joined, "down": naming.down}
    elif not gated:
        del leaves["gate"]
    numbers = set().union(*projections.values())
    experts = len(numbers)
    missing = _missing(prefix, numbers, projections, leaves)
    if missing is not None:
        return missing
    forms = {role: tuple(map(projections[name].__getitem__, range(experts))) for role, name in leaves.items()}
    (inner, *_), (hidden, *_) = forms["gate" if joined else "up"][0].weight.shape, forms["down"][0].weight.shape
    intermediate = inner // 2 if joined else inner
    shapes = {"gate": (inner, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    kept = {role: frozenset(distinct(forms[role])) for role in leaves}
    for role, name in leaves.items():
        wrong = {form for form in kept[role] if not _fits(form, shapes[role])}
        for number, form in enumerate(forms[role] if wrong else ()):
            if form in wrong:
                return _two_sizes(prefix, forms, joined=joined) or _wrong_shape(
                    f"{prefix}.{number}.{name}", shapes[role], form.weight.shape
                )
    implausible = _implausible(prefix, (experts, hidden, intermediate))
    if implausible is not None:
        return implausible
    biased = stored.has_bias(f"{prefix}.0.{naming.down}")
    if biased != any(stored.has_bias(f"{prefix}.0.{name}") for name in leaves.values()) or (
        biased and not all(stored.has_bias(f"{prefix}.{n}.{name}") for n in range(experts) for name in leaves.values())
    ):
        return finding(
            "experts-not-understood",
            prefix,
            "Only some projections of the experts have a bias",
            hint="engines expect biases on all of them, or on none",
        )
    all_forms = frozenset().union(*kept.values())
    return MoELayer(
        index=index,
        prefix=prefix,
        moe=prefix.removesuffix(f".{naming.module}"),
        naming=naming,
        layout="per_expert",
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        forms=forms,
        all_forms=all_forms,
        gated=gated,
        joined=joined,
        biased=biased,
        interleaved=(None if family is None else family.interleaved) if joined else False,
    )


def _naming(prefix: str, names: frozenset[str]) -> ExpertNaming | Finding:
    """The family of the names that a layer's projections have."""
    possible = [naming for naming in NAMINGS if prefix.endswith(f".{naming.module}")]
    naming = next((naming for naming in possible if names <= naming.leaves()), None)
    if naming is None:
        mixed = [naming for naming in possible if names & naming.leaves()]
        ways = " and ".join(sorted("/".join(naming.projections()) for naming in mixed))
        return finding("layout-conflict", prefix, f"The layer names its experts in two ways: {ways}")
    if naming.joined in names and names & {naming.gate, naming.up}:
        return finding(
            "layout-conflict", prefix, f"The layer stores {naming.gate} and {naming.up} alone and as {naming.joined}"
        )
    return naming


def _missing(
    prefix: str, numbers: set[int], projections: dict[str, dict[int, Form]], leaves: dict[Role, str]
) -> Finding | None:
    """The finding for a layer that lacks experts, or projections of some."""
    experts = set(range(len(numbers)))
    if experts == numbers and all(projections.get(name, {}).keys() == numbers for name in leaves.values()):
        return None
    gaps = [number for number in range(len(numbers)) if number not in numbers]
    lost = [
        f"{number}.{name}"
        for name in leaves.values()
        for number in sorted(numbers)
        if number not in projections.get(name, {})
    ]
    count = max(numbers) + 1 - len(numbers) if gaps else len(lost)
    noun = "expert" if gaps else "projection"
    first = f"expert {gaps[0]}" if gaps else lost[0]
    return finding(
        "expert-missing",
        prefix,
        f"The layer has experts up to number {max(numbers)} and lacks {plural(count, noun)}, first {first}",
        hint="download the checkpoint again; if it was published so, quantize it again",
        count=count,
    )


def _two_sizes(prefix: str, forms: dict[Role, tuple[Form, ...]], *, joined: bool) -> Finding | None:
    """The finding for a layer whose experts each fit together and differ in size, as those of text and of images do."""
    sizes: list[int] = []
    for up, down in zip(forms["gate" if joined else "up"], forms["down"], strict=True):
        if len(up.weight.shape) != 2 or len(down.weight.shape) != 2:
            return None
        (rows, hidden), (out, inner) = up.weight.shape, down.weight.shape
        if (rows // 2 if joined else rows, hidden) != (inner, out):
            return None
        sizes.append(inner)
    if len(set(sizes)) < 2:
        return None
    return finding(
        "experts-not-understood",
        prefix,
        f"The layer has experts of intermediate sizes {', '.join(map(str, dict.fromkeys(sizes)))}",
        hint="quarkconv reads layers whose experts are of one size",
        count=len(sizes),
    )


def _fits(form: Form, shape: tuple[int, int]) -> bool:
    """True for a projection of a shape. Formats that pack several codes into an element store fewer columns."""
    found = form.weight.shape
    if form.quantized or form.is_float:
        return found == shape
    return len(found) == 2 and found[0] == shape[0]


def _single_tensor_layer(
    prefix: str, index: int, tensors: dict[tuple[ExpertNaming, str], Form], family: Family | None
) -> MoELayer | Finding:
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
    transposed = layout == "fused" and _transposed(parts)
    if transposed:
        hidden, intermediate = parts["gate_up"].weight.shape[1], parts["gate_up"].weight.shape[2] // 2
    for part, form in parts.items() if not transposed else ():
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
    if transposed and any(form.quantized for form in all_forms):
        return finding(
            "experts-not-understood",
            prefix,
            "The experts are quantized in one tensor of transposed matrices",
            hint="no tool is known to write them so: quantize the model again",
        )
    return MoELayer(
        index=index,
        prefix=prefix,
        moe=moe,
        naming=naming,
        layout=layout,
        experts=experts,
        hidden=hidden,
        intermediate=intermediate,
        forms=forms,
        all_forms=all_forms,
        transposed=transposed,
        interleaved=False if family is None else family.interleaved,
    )


def _transposed(parts: dict[str, Form]) -> bool:
    """Whether gate_up is [E, H, 2I] and down [E, I, H]: no shapes are that and [E, 2I, H] and [E, H, I] too."""
    experts, hidden, both = parts["gate_up"].weight.shape
    return parts["down"].weight.shape == (experts, both // 2, hidden) and both % 2 == 0


def _implausible(prefix: str, geometry: tuple[int, int, int]) -> Finding | None:
    """The finding for a layer without experts, with empty ones, or with more than any model has."""
    experts, hidden, intermediate = geometry
    if 0 < experts <= MAX_EXPERTS and hidden and intermediate:
        return None
    return finding(
        "expert-shape",
        prefix,
        f"The layer has {experts} experts, hidden {hidden}, intermediate {intermediate}; expected 1 to "
        f"{MAX_EXPERTS} experts, and sizes above 0",
        hint="the file is corrupt or crafted: export the model again",
    )


def _layer_index(prefix: str, hidden_layers: int | None, position: int) -> int:
    numbers = _LAYER_NUMBER.findall(prefix)
    if not numbers:
        return position
    index = int(numbers[-1][:_MAX_DIGITS])
    separate_mtp = prefix.startswith("mtp.") or ".mtp." in prefix
    return index + (hidden_layers or 0) if separate_mtp else index


def _stack(prefix: str) -> int:
    """Position of the stack of layers of a module: the language model's comes first."""
    first = prefix.partition(".")[0]
    return _STACK_ORDER.index(first) if first in _STACK_ORDER else 0


def _geometry(layer: MoELayer) -> str:
    return f"{layer.experts} experts, hidden {layer.hidden}, intermediate {layer.intermediate}"


def _wrong_shape(subject: str, expected: tuple[int, ...], found: tuple[int, ...]) -> Finding:
    return finding(
        "expert-shape",
        subject,
        f"The projection has shape {list(found)}, the others of its layer need {list(expected)}",
        hint="download the checkpoint again; if it was published so, quantize it again",
    )
