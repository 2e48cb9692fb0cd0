"""The routed experts of one layer: their names, layout, size and forms."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

from quarkconv.experts.naming import HOLDERS, PAIRED, ROLES, ExpertNaming, Role
from quarkconv.experts.ranks import Rank
from quarkconv.scheme.form import Form, TensorNames, fused_names, linear_names
from quarkconv.scheme.spec import PER_CHANNEL

Layout = Literal["per_expert", "stacked", "fused"]
"""``per_expert``: ``experts.N.gate_proj.weight`` [I, H]. ``stacked`` (3-key): ``moe.gate_proj.weight`` [E, I, H].
``fused``: ``experts.gate_up_proj`` [E, 2I, H]."""


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
        alternate: the parts of weight and scale are rows that alternate: of two parts, 0 is every other row from the
            first on.
    """

    names: TensorNames
    form: Form
    weight: Part
    scale: Part
    alternate: bool = False


@dataclass(frozen=True, slots=True)
class MoELayer:
    """The routed experts of one layer.

    Attributes:
        index: number of the layer; those of a separate ``mtp.layers`` are counted on after the model's own.
        prefix: module of the experts, such as ``model.layers.3.mlp.experts``; fused tensors are named under it.
        moe: module that holds experts and router, such as ``model.layers.3.mlp``; see :attr:`router_module`.
        naming: family of the projections' names.
        layout: how the experts are laid out.
        experts, hidden, intermediate: E, H and I.
        forms: role -> the form of every expert's projection, E of them; in the layouts of one tensor for all experts,
            one. A fused layer has its gate and up under ``gate`` and an empty ``up``. One by one, experts without a
            gate have no ``gate``, those whose gate and up are joined no ``up``.
        all_forms: the distinct forms among them.
        gated: whether the experts have a gate.
        joined: gate and up of an expert are one projection, ``experts.3.gate_up_proj`` [2I, H].
        interleaved: the rows of gate and up in it alternate; None where that is not known.
        biased: the projections have biases, which are stored in float.
        transposed: the matrices of fused tensors are [in, out]; such experts are float.
        beside: a module or tensor below ``prefix`` whose meaning is not known; empty without any.
        beside_router: a tensor of the router, or of ``moe`` itself, that models of the family do not have.
        identities: how many experts that return their input follow the others, with a gate and an up without use.
        paired: fused tensors are the weights of linears, ``input_linear.weight`` and ``output_linear.weight``.
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
    gated: bool = True
    joined: bool = False
    interleaved: bool | None = False
    biased: bool = False
    transposed: bool = False
    paired: bool = False
    identities: int = 0
    beside: str = ""
    beside_router: str = ""

    @property
    def router_module(self) -> str:
        """The module that holds the router: ``moe``, or the one around it where ``moe`` holds the experts alone."""
        outer, _, leaf = self.moe.rpartition(".")
        return outer if leaf in HOLDERS else self.moe

    @property
    def roles(self) -> tuple[Role, ...]:
        """The projections that an expert has."""
        return ROLES if self.gated else ROLES[1:]

    def leaves(self) -> Iterator[tuple[str, tuple[Role, ...]]]:
        """The projections of one expert as they are named, each with what it holds."""
        if self.joined and self.naming.joined is not None:
            yield self.naming.joined, ("gate", "up")
            yield self.naming.down, ("down",)
            return
        for role in self.roles:
            yield self.naming.projection(role), (role,)

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
        leaf = self.naming.projection(role)
        if self.joined and role != "down":
            names, form = linear_names(f"{self.prefix}.{expert}.{self.naming.joined}"), self.forms["gate"][expert]
            half = Part(int(role == "up"), 2)
            shared = form.granularity != PER_CHANNEL
            return StoredProjection(names, form, half, whole if shared else half, bool(self.interleaved))
        if self.layout == "per_expert":
            form = self.forms[role][expert]
            return StoredProjection(linear_names(f"{self.prefix}.{expert}.{leaf}"), form, whole, whole)
        if self.layout == "stacked":
            return StoredProjection(linear_names(f"{self.moe}.{leaf}"), self.forms[role][0], matrix, matrix)
        gate_up, down = self._fused_modules
        names_of = linear_names if self.paired else fused_names
        if role == "down":
            return StoredProjection(names_of(down), self.forms["down"][0], matrix, matrix)
        names, form = names_of(gate_up), self.forms["gate"][0]
        half = Part(2 * expert + (role == "up"), 2 * self.experts)
        return StoredProjection(names, form, half, half if form.granularity == PER_CHANNEL else matrix)

    @property
    def module_names(self) -> list[str]:
        """The module of every projection, in the order of :meth:`modules`."""
        return [module for _, _, module in self.modules()]

    @property
    def identity_modules(self) -> list[str]:
        """The modules of the experts that return their input: no role, so not among :meth:`modules`."""
        numbers = range(self.experts, self.experts + self.identities)
        return [f"{self.prefix}.{number}.{self.naming.projection(role)}" for number in numbers for role in ROLES[:2]]

    def modules(self) -> Iterator[tuple[Role, int, str]]:
        """(role, expert, module) of every projection; in the layouts of one tensor for all experts, expert is 0."""
        for name, (role, *_) in self.leaves() if self.layout != "fused" else ():
            if self.layout == "per_expert":
                for expert in range(self.experts):
                    yield role, expert, f"{self.prefix}.{expert}.{name}"
            else:
                yield role, 0, f"{self.moe}.{name}"
        if self.layout == "fused":
            gate_up, down = self._fused_modules
            yield "gate", 0, gate_up
            yield "down", 0, down

    @property
    def _fused_modules(self) -> tuple[str, str]:
        """The modules of gate_up and down that hold all experts of a fused layer."""
        if self.paired:
            gate_up, down = (f"{self.moe}.{leaf}" for leaf in PAIRED)
            return gate_up, down
        return f"{self.prefix}.{self.naming.fused_gate_up}", f"{self.prefix}.{self.naming.fused_down}"
