"""Which layers have routed experts, under which names, in which layout and of which size."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final, Literal, NamedTuple

from quarkconv.experts.naming import BY_PROJECTION, EXPERTS, NAMINGS, ROLES, ExpertNaming, Role
from quarkconv.experts.ranks import Rank
from quarkconv.findings import Finding, finding
from quarkconv.headers.safetensors import distinct
from quarkconv.scheme.spec import PER_CHANNEL
from quarkconv.scheme.stored import Form, StoredModules, TensorNames, fused_names, linear_names

Layout = Literal["per_expert", "stacked", "fused"]
"""``per_expert``: ``experts.N.gate_proj.weight`` [I, H]. ``stacked`` (3-key): ``moe.gate_proj.weight`` [E, I, H].
``fused``: ``experts.gate_up_proj`` [E, 2I, H]."""

_LAYER_NUMBER: Final = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)(?:\.|$)")
_EXPERT_SUFFIX: Final = "." + EXPERTS
_MAX_DIGITS: Final = 9
"""Longer numbers of layers and experts are not believed."""
MAX_EXPERTS: Final = 2**16
"""Nor are more experts in a layer: tensors of no bytes can claim any number."""


class Part(NamedTuple):
    """Part ``number`` of ``of`` equal parts of a tensor, along its leading dimensions."""

    number: int
    of: int


class StoredProjection(NamedTuple):
    """Where a projection of an expert is stored.

    Attributes:
        names: tensors that hold it, alone or with others.
        form: dtypes and shapes of these tensors.
        weight: part of the weight that is the projection's.
        scale: part of the weight's scale; gate and up of a fused tensor share a scale per tensor.
    """

    names: TensorNames
    form: Form
    weight: Part
    scale: Part


@dataclass(frozen=True, slots=True)
class MoELayer:
    """The routed experts of one layer.

    Attributes:
        index: number of the layer; those of a separate ``mtp.layers`` are counted on after the model's own.
        prefix: module of the experts, such as ``model.layers.3.mlp.experts``; fused tensors are named under it.
        moe: module that holds experts and router, such as ``model.layers.3.mlp``.
        naming: family of the projections' names.
        layout: how the experts are laid out.
        experts, hidden, intermediate: E, H and I.
        forms: role -> the form of every expert's projection, E of them; in the layouts of one tensor for all experts,
            one. A fused layer has its gate and up under ``gate`` and an empty ``up``.
        all_forms: the distinct forms among them.
    """

    index: int
    prefix: str
    moe: str
    naming: ExpertNaming
    layout: Layout
    experts: int
    hidden: int
    intermediate: int
    forms: dict[Role, tuple[Form, ...]]
    all_forms: frozenset[Form]

    @property
    def geometry(self) -> tuple[int, int, int]:
        """E, H and I."""
        return self.experts, self.hidden, self.intermediate

    def geometry_of(self, rank: Rank) -> tuple[int, int, int]:
        """E, H and I of what a rank has of the layer."""
        return len(rank.experts(self.experts)), self.hidden, len(rank.intermediate(self.intermediate))

    @property
    def quantized(self) -> bool:
        """True when every projection of every expert is stored in int8."""
        return all(form.quantized for form in self.all_forms)

    @property
    def partly_quantized(self) -> bool:
        """True when some projections are stored in int8 and others are not."""
        return len({form.quantized for form in self.all_forms}) > 1

    @property
    def static(self) -> bool:
        """True when every projection of every expert has a static input scale."""
        return all(form.input_scale is not None for form in self.all_forms)

    def float_experts(self) -> int:
        """How many experts have a projection that is stored in float."""
        if self.layout != "per_expert":
            return self.experts if any(form.is_float for form in self.all_forms) else 0
        if not any(form.is_float for form in self.all_forms):
            return 0
        return sum(any(form.is_float for form in forms) for forms in zip(*self.forms.values(), strict=True))

    def projection(self, role: Role, expert: int) -> StoredProjection:
        """The tensors that hold a projection of an expert, and where in them it lies, whatever the layout."""
        whole, matrix = Part(0, 1), Part(expert, self.experts)
        leaf = getattr(self.naming, role)
        if self.layout == "per_expert":
            form = self.forms[role][expert]
            return StoredProjection(linear_names(f"{self.prefix}.{expert}.{leaf}"), form, whole, whole)
        if self.layout == "stacked":
            return StoredProjection(linear_names(f"{self.moe}.{leaf}"), self.forms[role][0], matrix, matrix)
        if role == "down":
            names = fused_names(f"{self.prefix}.{self.naming.fused_down}")
            return StoredProjection(names, self.forms["down"][0], matrix, matrix)
        names, form = fused_names(f"{self.prefix}.{self.naming.fused_gate_up}"), self.forms["gate"][0]
        half = Part(2 * expert + (role == "up"), 2 * self.experts)
        return StoredProjection(names, form, half, half if form.granularity == PER_CHANNEL else matrix)

    def modules(self) -> Iterator[tuple[Role, int, str]]:
        """(role, expert, module) of every projection; in the layouts of one tensor for all experts, expert is 0."""
        for role, name in zip(ROLES, self.naming.projections(), strict=True):
            if self.layout == "per_expert":
                for expert in range(self.experts):
                    yield role, expert, f"{self.prefix}.{expert}.{name}"
            elif self.layout == "stacked":
                yield role, 0, f"{self.moe}.{name}"
        if self.layout == "fused":
            yield "gate", 0, f"{self.prefix}.{self.naming.fused_gate_up}"
            yield "down", 0, f"{self.prefix}.{self.naming.fused_down}"


@dataclass(frozen=True, slots=True)
class Topology:
    """The MoE layers of a model, in order, and what is wrong with their experts.

    Attributes:
        layers: the layers whose experts are complete.
        findings: what is missing or does not fit.
        members: names of all modules that are routed experts, complete or not.
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
    findings: list[Finding] = []
    per_expert, single, members = _collect(stored, findings)
    layers: dict[str, MoELayer] = {}
    for prefix, projections in per_expert.items():
        index = _layer_index(prefix, hidden_layers, len(layers))
        layer = _per_expert_layer(prefix, index, projections, findings)
        if layer is not None:
            layers[prefix] = layer
    for prefix, tensors in single.items():
        index = _layer_index(prefix, hidden_layers, len(layers))
        if prefix in per_expert:
            findings.append(
                finding(
                    "layout-conflict", prefix, "The layer stores its experts one by one and in one tensor as well",
                    hint="remove one of the two: engines load one and drop the other",
                )
            )  # fmt: skip
            layers.pop(prefix, None)
            continue
        layer = _single_tensor_layer(prefix, index, tensors, findings)
        if layer is not None:
            layers[prefix] = layer
    for layer in layers.values():
        if config_experts is not None and layer.experts != config_experts:
            findings.append(
                finding(
                    "expert-count", layer.prefix,
                    f"The layer stores {layer.experts} experts, config.json says {config_experts}",
                    hint="take the config.json that belongs to these weights",
                )
            )  # fmt: skip
    ordered = tuple(sorted(layers.values(), key=lambda layer: (layer.index, layer.prefix)))
    odd = [layer for layer in ordered if layer.geometry != ordered[0].geometry]
    if odd:
        findings.append(
            finding(
                "layer-geometry", odd[0].prefix,
                f"{len(odd)} of {len(ordered)} MoE layers have another number or size of experts than the first: "
                f"{_geometry(odd[0])} instead of {_geometry(ordered[0])}", count=len(odd),
            )
        )  # fmt: skip
    return Topology(ordered, tuple(findings), frozenset(members))


_PerExpert = dict[str, dict[str, dict[int, Form]]]  # module of the experts -> projection -> number -> form
_Single = dict[str, dict[tuple[ExpertNaming, str], Form]]


def _collect(stored: StoredModules, findings: list[Finding]) -> tuple[_PerExpert, _Single, list[str]]:
    """Group the modules that are routed experts by the module that holds them."""
    misspelt: list[str] = []
    last_head, place = None, None
    places: dict[str, tuple[dict[str, dict[int, Form]], int]] = {}  # module of an expert -> its layer, its number
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
            last_head, place = head, places.get(head)
        if place is None:
            prefix, _, number = head.rpartition(".")
            if not (prefix.endswith(_EXPERT_SUFFIX) and number.isascii() and number.isdecimal()):
                continue
            if number[0] == "0" != number or len(number) > _MAX_DIGITS:
                misspelt.append(module)
                continue
            place = places[head] = (per_expert.setdefault(prefix, {}), int(number))
        projections, expert = place
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
    if misspelt:
        findings.append(
            finding(
                "tensor-unrecognised", misspelt[0],
                f"{len(misspelt)} module(s) of experts have a number that no engine writes, such as 01",
                hint="conversion treats them as ordinary linears; engines drop them", count=len(misspelt),
            )
        )  # fmt: skip
    return per_expert, single, members


def _per_expert_layer(
    prefix: str, index: int, projections: dict[str, dict[int, Form]], findings: list[Finding]
) -> MoELayer | None:
    namings = {BY_PROJECTION[name][0] for name in projections}
    if len(namings) > 1:
        names = " and ".join(sorted("/".join(naming.projections()) for naming in namings))
        findings.append(finding("layout-conflict", prefix, f"The layer names its experts in two ways: {names}"))
        return None
    naming = namings.pop()
    numbers = set().union(*projections.values())
    experts = len(numbers)
    wanted = range(experts)
    gaps = [number for number in wanted if number not in numbers]
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
        findings.append(
            finding(
                "expert-missing", prefix,
                f"The layer has experts up to number {max(numbers)}, and {count} {what}(s) missing, first {first}",
                hint="download the checkpoint again; if it came so, quantize it again", count=count,
            )
        )  # fmt: skip
        return None
    names_of = dict(zip(ROLES, naming.projections(), strict=True))
    forms = {role: tuple(map(projections[name].__getitem__, wanted)) for role, name in names_of.items()}
    intermediate, hidden = forms["gate"][0].weight.shape[0], forms["down"][0].weight.shape[0]
    right = {"gate": (intermediate, hidden), "up": (intermediate, hidden), "down": (hidden, intermediate)}
    kept = {role: frozenset(distinct(forms[role])) for role in ROLES}
    for role, name in names_of.items():
        wrong = {form for form in kept[role] if not _fits(form, right[role])}
        for number, form in enumerate(forms[role] if wrong else ()):
            if form in wrong:
                findings.append(_wrong_shape(f"{prefix}.{number}.{name}", right[role], form.weight.shape))
                return None
    if not _believable(prefix, (experts, hidden, intermediate), findings):
        return None
    moe = prefix.removesuffix(_EXPERT_SUFFIX)
    all_forms = frozenset().union(*kept.values())
    return MoELayer(index, prefix, moe, naming, "per_expert", experts, hidden, intermediate, forms, all_forms)


def _fits(form: Form, shape: tuple[int, int]) -> bool:
    """Whether a projection has a shape; formats that pack several codes into an element store fewer columns."""
    found = form.weight.shape
    if form.quantized or form.is_float:
        return found == shape
    return len(found) == 2 and found[0] == shape[0]


def _single_tensor_layer(
    prefix: str, index: int, tensors: dict[tuple[ExpertNaming, str], Form], findings: list[Finding]
) -> MoELayer | None:
    """A layer whose experts share tensors: stacked (gate, up, down) or fused (gate_up, down)."""
    for naming in NAMINGS:
        parts = {part: form for (owner, part), form in tensors.items() if owner is naming}
        if not parts:
            continue
        layout: Layout = "fused" if "gate_up" in parts else "stacked"
        needed = ("gate_up", "down") if layout == "fused" else ROLES
        lost = [part for part in needed if part not in parts]
        if lost or len(parts) != len(tensors):
            message = f"The layer has no {lost[0]} tensor" if lost else "The layer mixes names of two families"
            findings.append(finding("expert-missing" if lost else "layout-conflict", prefix, message))
            return None
        moe = prefix.removesuffix(_EXPERT_SUFFIX)
        experts, rows, hidden = parts[needed[0]].weight.shape
        intermediate = rows // 2 if layout == "fused" else rows
        right = {
            "gate_up": (experts, 2 * intermediate, hidden), "gate": (experts, intermediate, hidden),
            "up": (experts, intermediate, hidden), "down": (experts, hidden, intermediate),
        }  # fmt: skip
        for part, form in parts.items():
            if form.weight.shape != right[part]:
                findings.append(_wrong_shape(f"{prefix} ({part})", right[part], form.weight.shape))
                return None
        if not _believable(prefix, (experts, hidden, intermediate), findings):
            return None
        forms: dict[Role, tuple[Form, ...]] = {"down": (parts["down"],)}
        if layout == "fused":
            forms = {"gate": (parts["gate_up"],), "up": (), **forms}
        else:
            forms = {"gate": (parts["gate"],), "up": (parts["up"],), **forms}
        all_forms = frozenset(parts.values())
        return MoELayer(index, prefix, moe, naming, layout, experts, hidden, intermediate, forms, all_forms)
    return None


def _believable(prefix: str, geometry: tuple[int, int, int], findings: list[Finding]) -> bool:
    """Whether a layer has experts, of elements, and no more than any model has."""
    experts, hidden, intermediate = geometry
    if 0 < experts <= MAX_EXPERTS and hidden and intermediate:
        return True
    findings.append(
        finding(
            "expert-shape", prefix,
            f"The layer has {experts} experts, hidden {hidden}, intermediate {intermediate}; a layer has 1 to "
            f"{MAX_EXPERTS} experts, and none of them is empty",
            hint="these are no weights of a model",
        )
    )  # fmt: skip
    return False


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
        "expert-shape", subject,
        f"The projection has shape {list(found)}, the others of its layer need {list(expected)}",
        hint="download the checkpoint again; if it came so, quantize it again",
    )  # fmt: skip
