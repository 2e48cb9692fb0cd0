"""The names of an expert's projections in models.

A routed expert computes ``down(act(gate(x)) * up(x))``; some have no gate. Checkpoints name the projections in
families. Engines that load fused experts route their tensors by the same names, so a fused checkpoint keeps the family
of its source.
"""

from __future__ import annotations

from typing import Final, Literal, NamedTuple

Role = Literal["gate", "up", "down"]
ROLES: Final[tuple[Role, Role, Role]] = ("gate", "up", "down")


class ExpertNaming(NamedTuple):
    """A family of names.

    Attributes:
        gate, up, down: the projections of one expert, as in ``experts.3.gate_proj``.
        fused_gate_up: all experts' gate and up in one tensor [E, 2I, H], as in ``experts.gate_up_proj``; None where no
            engine has one.
        fused_down: all experts' down in one tensor [E, H, I].
        module: end of the name of the module whose children are the numbers of the experts.
        joined: gate and up of one expert in one projection [2I, H]; None where no model has one.
    """

    gate: str
    up: str
    down: str
    fused_gate_up: str | None = None
    fused_down: str | None = None
    module: str = "experts"
    joined: str | None = None

    def projections(self) -> tuple[str, str, str]:
        """The names in the order of :data:`ROLES`."""
        return self.gate, self.up, self.down

    def projection(self, role: Role) -> str:
        """The name of one of them."""
        return self.projections()[ROLES.index(role)]

    def leaves(self) -> frozenset[str]:
        """Every name that a projection of one expert may have."""
        return frozenset({*self.projections(), *([] if self.joined is None else [self.joined])})


NAMINGS: Final = (
    ExpertNaming("gate_proj", "up_proj", "down_proj", "gate_up_proj", "down_proj", joined="gate_up_proj"),
    ExpertNaming("w1", "w3", "w2", "w13", "w2"),
    ExpertNaming("w1", "v1", "w2", module="experts.mlp"),  # dbrx
    ExpertNaming("linear", "linear_v", "linear_1"),  # grok-1
)
"""The families that are understood. A new one is one row."""

ENGINE_NAMES: Final[dict[str, tuple[str, ExpertNaming]]] = {
    "mixtral": ("block_sparse_moe", NAMINGS[1]),
    "minimax_m2": ("block_sparse_moe", NAMINGS[1]),
}
"""Model type -> name of the MoE module and names of projections in engines' classes, where exports may have others:
those of classes of transformers 5 (``mlp``, ``gate_proj``), which llm-compressor and Quark (in memory) write.
vLLM 0.33 drops fused tensors of other names without an error."""

_OTHER_NAMES: Final[dict[str, tuple[str, ExpertNaming]]] = {
    **ENGINE_NAMES,
    **dict.fromkeys(("git", "kimi_k3", "kimi_linear", "minimax_m3_vl", "phimoe"), ("block_sparse_moe", NAMINGS[1])),
    **dict.fromkeys(("jamba", "llama4"), ("feed_forward", NAMINGS[0])),
    "deepseek_v4": ("ffn", NAMINGS[1]),
    "gemma4": ("", NAMINGS[0]),
    "lfm2_moe": ("feed_forward", NAMINGS[1]),
    "nemotron_h": ("mixer", NAMINGS[0]),
    "step3p5": ("moe", NAMINGS[0]),
}


_ROOTS: Final[dict[str, tuple[str, ...]]] = {
    "dbrx": ("transformer.",),
    "deepseek_v4": ("",),
    "deepseek_vl_v2": ("language.model.",),
    "nemotron_h": ("backbone.",),
    **dict.fromkeys(("aria", "glm5_next", "qwen3_vl_moe"), ("model.language_model.",)),
    **dict.fromkeys(("kimi_k25", "kimi_k3", "minimax_m3_vl"), ("language_model.model.",)),
    **dict.fromkeys(("qwen3_5_moe", "qwen4_exp"), ("model.language_model.", "model.")),
}


def published_roots(model_type: str) -> tuple[str, ...]:
    """What the names of the language model's layers begin with in published checkpoints, before ``layers.``."""
    return _ROOTS.get(model_type, ("model.",))


def published_names(model_type: str) -> tuple[str, ExpertNaming]:
    """The name of the MoE module and the names of projections in published checkpoints of a model type.

    These are what engines were run with. The module's name is empty where experts lie directly in the layer.
    """
    return _OTHER_NAMES.get(model_type, ("mlp", NAMINGS[0]))


HOLDERS: Final = frozenset({"switch_mlp"})
"""Names of modules that hold the experts of a layer and no router, which is beside them (``SwitchGLU`` of mlx-lm)."""

STACKED_MODEL_TYPES: Final = frozenset({"step3p5"})
"""Model types whose own checkpoints have ``moe.gate_proj`` for all experts (3-key); engines know no other names."""

EXPERTS: Final = "experts"
"""Last part of the name of the module that holds the routed experts, below which fused tensors are named."""

EXPERT_MODULES: Final = tuple(dict.fromkeys(f".{naming.module}" for naming in NAMINGS))
"""Ends of the names of the modules whose children are experts."""

LEAVES: Final = frozenset[str]().union(*(naming.leaves() for naming in NAMINGS))
"""Every last part of a projection's name."""

STACKED: Final[dict[str, tuple[ExpertNaming, Role]]] = {
    name: (naming, role)
    for naming in reversed(NAMINGS)
    if naming.fused_gate_up is not None
    for name, role in zip(naming.projections(), ROLES, strict=True)
}
"""Name of a projection of all experts in one tensor (3-key) -> its family and role."""

PAIRED: Final[dict[str, str]] = {"input_linear": "gate_up", "output_linear": "down"}
"""Linears of the MoE module that hold all experts as published (granitemoe, granitemoehybrid) -> their part: weights
[E, 2I, H], gate before up, and [E, H, I]. Their scales have the same names, ``input_linear.weight_scale`` [E, 2I, 1]
(``load_weights`` of vLLM 0.33's granitemoehybrid.py, for checkpoints of llm-compressor)."""

FUSED_LEAVES: Final = frozenset(
    name for naming in NAMINGS for name in (naming.fused_gate_up, naming.fused_down) if name is not None
)
"""Last parts of the names of fused tensors."""
