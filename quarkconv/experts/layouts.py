"""One MoE layer from its stored modules, in each layout; or the finding where they do not make a layer."""

from __future__ import annotations

from collections.abc import Mapping

from quarkconv.experts.family import Family
from quarkconv.experts.layer import Layout, MoELayer
from quarkconv.experts.layer_defects import (
    experts_of_two_sizes,
    implausible_geometry,
    missing_experts,
    packed_experts,
    wrong_shape,
)
from quarkconv.experts.naming import EXPERTS, NAMINGS, PAIRED, ROLES, ExpertNaming, Role
from quarkconv.experts.unread import RENAMED_HINT
from quarkconv.findings import NOT_UNDERSTOOD, Finding, finding
from quarkconv.headers.entries import distinct
from quarkconv.scheme.form import Form
from quarkconv.scheme.stored import StoredModules


def per_expert_layer(
    prefix: str, index: int, projections: dict[str, dict[int, Form]], stored: StoredModules, family: Family | None
) -> MoELayer | Finding:
    """A layer whose experts are modules of their own.

    Args:
        prefix: module of the experts.
        index: number of the layer.
        projections: last part of the projections' names -> number of the expert -> form.
        stored: all modules, for biases.
        family: the family of the model, where it is known.
    """
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
    identities = _identities(projections, leaves) if family is not None and family.router.zero_experts else 0
    if identities:
        last = len(projections[naming.up]) - identities
        projections = {
            name: {number: form for number, form in forms.items() if number < last}
            for name, forms in projections.items()
        }
    numbers = set().union(*projections.values())
    experts = len(numbers)
    missing = missing_experts(prefix, numbers, projections, leaves)
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
                return (
                    packed_experts(prefix, forms, joined=joined)
                    or experts_of_two_sizes(prefix, forms, joined=joined)
                    or wrong_shape(f"{prefix}.{number}.{name}", shapes[role], form.weight.shape)
                )
    implausible = implausible_geometry(prefix, (experts, hidden, intermediate))
    if implausible is not None:
        return implausible
    biased = _biased(prefix, range(experts), {name: shapes[role][0] for role, name in leaves.items()}, stored)
    if isinstance(biased, Finding):
        return biased
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
        all_forms=frozenset().union(*kept.values()),
        gated=gated,
        joined=joined,
        biased=biased,
        interleaved=(None if family is None else family.interleaved) if joined else False,
        identities=identities,
    )


def _identities(projections: dict[str, dict[int, Form]], leaves: dict[Role, str]) -> int:
    """How many experts have a gate and an up, and no down, after those that have all three.

    Source: ``LongcatFlashExperts`` of transformers 5.24, whose ``gate_up_proj`` has rows for experts that return their
    input, and whose ``down_proj`` has none; its ``save_pretrained`` writes them one by one.
    """
    if len(leaves) < len(ROLES):
        return 0
    gate, up, down = (projections.get(leaves[role], {}).keys() for role in ROLES)
    stored, complete = set(range(len(up))), set(range(len(down)))
    return len(up) - len(down) if down and complete < stored == gate == up and down == complete else 0


def _naming(prefix: str, names: frozenset[str]) -> ExpertNaming | Finding:
    """The family of the names that a layer's projections have."""
    possible = [naming for naming in NAMINGS if prefix.endswith(f".{naming.module}")]
    naming = next((naming for naming in possible if names <= naming.leaves()), None)
    if naming is None:
        mixed = [naming for naming in possible if names & naming.leaves()]
        families = " and ".join(sorted("/".join(naming.projections()) for naming in mixed))
        message = f"The layer names its experts in two ways: {families}"
        return finding("layout-conflict", prefix, message, hint="export the model again with one naming")
    if naming.joined in names and names & {naming.gate, naming.up}:
        return finding(
            "layout-conflict",
            prefix,
            f"The layer stores {naming.gate} and {naming.up} both separately and as {naming.joined}",
        )
    return naming


def _biased(prefix: str, numbers: range, rows: dict[str, int], stored: StoredModules) -> bool | Finding:
    """Whether the projections of experts have biases: all or none of them, [rows]."""
    if not stored.biases:
        return False
    projections = {f"{prefix}.{number}.{name}": count for name, count in rows.items() for number in numbers}
    with_bias = [name for name in projections if stored.has_bias(name)]
    if not with_bias:
        return False
    if len(with_bias) < len(projections):
        return finding(
            NOT_UNDERSTOOD,
            prefix,
            "Only some projections of the experts have a bias",
            hint=f"engines expect biases on all of them or none; {RENAMED_HINT}",
        )
    for name, count in projections.items():
        bias = f"{name}.bias"
        if stored.tensors[bias].shape != (count,):
            return wrong_shape(bias, (count,), stored.tensors[bias].shape)
    return True


def _fits(form: Form, shape: tuple[int, ...]) -> bool:
    """True for a weight of a shape. Formats that pack several codes into an element store fewer columns."""
    found = form.weight.shape
    if form.quantized or form.is_float:
        return found == shape
    return len(found) == len(shape) and found[:-1] == shape[:-1]


def single_tensor_layer(
    prefix: str,
    index: int,
    tensors: dict[tuple[ExpertNaming, str], Form],
    stored: StoredModules,
    family: Family | None,
) -> MoELayer | Finding:
    """A layer whose experts share tensors: stacked (gate, up, down) or fused (gate_up, down).

    Args:
        prefix: module of the experts.
        index: number of the layer.
        tensors: naming, and gate, up, gate_up or down -> form.
        stored: all modules, for biases.
        family: the family of the model, where it is known.
    """
    naming = next(naming for naming in NAMINGS if any(owner is naming for owner, _ in tensors))
    parts = {part: form for (owner, part), form in tensors.items() if owner is naming}
    layout: Layout = "fused" if "gate_up" in parts else "stacked"
    needed = ("gate_up", "down") if layout == "fused" else ROLES
    lost = [part for part in needed if part not in parts]
    if lost:
        return _lost(prefix, lost[0], f"{prefix}.{naming.joined}", stored)
    if len(parts) != len(tensors):
        return finding("layout-conflict", prefix, "The layer mixes names of two families")
    moe = prefix.removesuffix(f".{EXPERTS}")
    paired = layout == "fused" and any(f"{moe}.{leaf}" in stored.linears for leaf in PAIRED)
    if paired and any(f"{prefix}.{leaf}" in stored.fused for leaf in (naming.fused_gate_up, naming.fused_down)):
        return finding("layout-conflict", prefix, f"The layer stores its experts as {' and '.join(PAIRED)} and fused")
    transposed = layout == "fused" and _transposed(parts)
    geometry = _transposed_geometry(parts) if transposed else _geometry(prefix, parts, parts[needed[0]])
    if isinstance(geometry, Finding):
        return geometry
    experts, hidden, intermediate = geometry
    implausible = implausible_geometry(prefix, geometry)
    if implausible is not None:
        return implausible
    forms: dict[Role, tuple[Form, ...]] = {"down": (parts["down"],)}
    if layout == "fused":
        forms = {"gate": (parts["gate_up"],), "up": (), **forms}
    else:
        forms = {"gate": (parts["gate"],), "up": (parts["up"],), **forms}
    all_forms = frozenset(parts.values())
    interleaved = layout == "fused" and family is not None and family.interleaved
    biased = _has_biases(prefix, naming, layout, stored, paired=paired)
    kinds = {
        "with transposed matrices": transposed,
        "with alternating rows of gate and up": interleaved,
        "with biases": biased,
    }
    unread = [kind for kind, found in kinds.items() if found]
    if unread and any(form.quantized for form in all_forms):
        return finding(
            NOT_UNDERSTOOD,
            prefix,
            f"The layer stores its int8 experts in one tensor, {' and '.join(unread)}",
            hint="no engine loads these: quantize the model with separate experts",
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
        biased=biased,
        interleaved=interleaved,
        paired=paired,
    )


def _geometry(prefix: str, parts: Mapping[str, Form], first: Form) -> tuple[int, int, int] | Finding:
    """E, H and I of experts that share tensors, or the defect of a tensor whose shape does not fit the others.

    Args:
        prefix: module of the experts.
        parts: gate, up, gate_up or down -> form.
        first: the form of gate_up, or of gate.
    """
    experts, rows, hidden = first.weight.shape
    if not (first.quantized or first.is_float):  # several codes in an element: fewer columns
        _, hidden, _ = parts["down"].weight.shape
    fused = "gate_up" in parts
    intermediate = rows // 2 if fused else rows
    shapes = {
        "gate_up": (experts, 2 * intermediate, hidden),
        "gate": (experts, intermediate, hidden),
        "up": (experts, intermediate, hidden),
        "down": (experts, hidden, intermediate),
    }
    for part, form in parts.items():
        if not _fits(form, shapes[part]):
            ends: dict[Role, tuple[Form, ...]] = {"gate": (first,), "up": (first,), "down": (parts["down"],)}
            return packed_experts(prefix, ends, joined=fused) or wrong_shape(
                f"{prefix} ({part})", shapes[part], form.weight.shape
            )
    return experts, hidden, intermediate


def _transposed_geometry(parts: Mapping[str, Form]) -> tuple[int, int, int]:
    """E, H and I of experts whose gate_up is [E, H, 2I]."""
    experts, hidden, columns = parts["gate_up"].weight.shape
    return experts, hidden, columns // 2


def _lost(prefix: str, part: str, joined: str, stored: StoredModules) -> Finding:
    """The finding about a layer without one of its tensors; ``joined`` may hold it under a name that is not read."""
    if joined not in stored.linears:
        return finding("expert-missing", prefix, f"The layer has no {part} tensor")
    return finding(
        NOT_UNDERSTOOD,
        prefix,
        f"The layer stores gate and up of its experts as one three-dimensional linear, {joined}",
        hint=RENAMED_HINT,
    )


def _has_biases(prefix: str, naming: ExpertNaming, layout: Layout, stored: StoredModules, *, paired: bool) -> bool:
    """Whether experts that share tensors have biases: ``experts.down_proj_bias``, or ``moe.down_proj.bias``."""
    if layout == "fused" and not paired:
        return any(f"{prefix}.{leaf}_bias" in stored.tensors for leaf in (naming.fused_gate_up, naming.fused_down))
    moe = prefix.removesuffix(f".{EXPERTS}")
    leaves = PAIRED if paired else naming.projections()
    return any(stored.has_bias(f"{module}.{leaf}") for module in (moe, prefix) for leaf in leaves)


def _transposed(parts: dict[str, Form]) -> bool:
    """Whether gate_up is [E, H, 2I] and down [E, I, H]: no shapes are that and [E, 2I, H] and [E, H, I] too."""
    experts, hidden, both = parts["gate_up"].weight.shape
    return parts["down"].weight.shape == (experts, both // 2, hidden) and both % 2 == 0
