"""Routing and activation function of a layer's experts, as values."""

from __future__ import annotations

from typing import NamedTuple

from quarkconv.experts.family import ActivationName, GroupScore, RouterTensors, Scoring


class Unknown(NamedTuple):
    """The reason why routing or function is unknown.

    Attributes:
        reason: a sentence without its full stop, for people.
        key: the config key that decides it; None where it is the model type.
        missing: config.json lacks the key, and engines take the default of their class.
    """

    reason: str
    key: str | None = None
    missing: bool = False


class Routing(NamedTuple):
    """The routing of one model's MoE layers.

    `n_group` is 1 where the choice is not limited to groups. `group_score` ranks groups by their best expert ("max")
    or by the sum of their best two ("top2"). `epsilon` is what the model adds to the norm that it divides by, `floor`
    the least divisor. `bias_name` is the correction bias below the MoE module, if any.
    `zero_experts` follow the others in the router's weight: they return their input. The other fields are those of
    :class:`quarkconv.experts.family.RouterRule`.
    """

    model_type: str
    scoring: Scoring
    experts: int
    top_k: int
    renormalize: bool
    scaling_factor: float = 1.0
    epsilon: float = 0.0
    n_group: int = 1
    topk_group: int = 1
    group_score: GroupScore = "top2"
    bias_name: str | None = None
    by_logits: bool = False
    floor: float = 0.0
    norm_order: float = 1.0
    softcap: float | None = None
    jitter: float = 0.0
    zero_experts: int = 0
    input_norm: float | None = None
    """Epsilon of the RMS norm of the router's input; None without one."""
    on_input: bool = False
    by_token_id: bool = False
    """The experts of a token are those of its id in a table; the router's scores weigh them."""
    tensors: RouterTensors = RouterTensors()

    @property
    def has_correction_bias(self) -> bool:
        return self.bias_name is not None

    def describe(self) -> str:
        """One line for people.

        >>> Routing("deepseek_v3", "sigmoid", 8, 4, True, 2.5, n_group=4, topk_group=2, bias_name="gate.b").describe()
        'sigmoid + correction bias, top 4 of 8 in 2 of 4 groups, renormalised, x2.5'
        """
        scores = f"{self.scoring} of the chosen" if self.by_logits else self.scoring
        count = f"{self.top_k} of {self.experts}"
        chosen = f"{count} by token id" if self.by_token_id else f"top {count}"
        parts = [
            scores + (" + correction bias" if self.has_correction_bias else ""),
            chosen
            + (f" and {self.zero_experts} without weights" if self.zero_experts else "")
            + (f" in {self.topk_group} of {self.n_group} groups" if self.n_group > 1 else ""),
        ]
        if not (self.by_logits and self.scoring == "softmax"):
            order = "" if self.norm_order == 1.0 else f" by the {self.norm_order:g}-norm"
            parts.append(f"renormalised{order}" if self.renormalize else "not renormalised")
        if self.softcap is not None:
            parts.append(f"logits capped at {self.softcap:g}")
        if self.scaling_factor != 1.0:
            parts.append(f"x{self.scaling_factor:g}")
        if self.tensors.expert_scale:
            parts.append("scaled per expert")
        if self.on_input:
            parts.append("weights on the input")
        return ", ".join(parts)


class ExpertActivation(NamedTuple):
    """The activation function of an expert: g and u are the outputs of gate and up.

    ``silu`` silu(g) u, with a limit l silu(min(g, l)) clamp(u, -l, l); ``swiglustep`` min(silu(g), l) clamp(u, -l, l);
    ``gelu`` and ``gelu_tanh`` gelu(g) u, exact and in the tanh approximation; ``relu2`` relu(u)^2, without a gate;
    ``swigluoai`` g' sigmoid(alpha g') (u' + 1) with g' = min(g, l), u' = clamp(u, -l, l); ``situ``
    beta tanh(g / beta) sigmoid(g) u', with u' = linear_beta tanh(u / linear_beta) where that is set.

    Attributes:
        name: of the function, as :func:`quarkconv.kernels.fused_experts_int8` takes it.
        limit, alpha, beta, linear_beta: its parameters; None for those that it does not have.
    """

    name: ActivationName
    limit: float | None = None
    alpha: float | None = None
    beta: float | None = None
    linear_beta: float | None = None

    @property
    def gated(self) -> bool:
        """Whether there is a gate."""
        return self.name != "relu2"

    def describe(self) -> str:
        """One line for people."""
        parts = [self.name if self.limit is None else f"{self.name}, clamped at {self.limit:g}"]
        names = {"alpha": self.alpha, "beta": self.beta, "linear beta": self.linear_beta}
        parts += [f"{name} {value:g}" for name, value in names.items() if value is not None]
        return ", ".join(parts)
