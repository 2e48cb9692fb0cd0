"""The results of ``evaluate`` as data."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, Final

from quarkconv.evaluate.request import Limits
from quarkconv.evaluate.scores import Divergence, Perplexity
from quarkconv.text import plural

SCHEMA: Final = "quarkconv.evaluate/1"
WORST: Final = 5
"""How many layers and experts are named as the worst."""


@dataclass(frozen=True, slots=True)
class ExpertError:
    """Error of one expert on the tokens that the baseline routed to it, in a sample of tokens.

    Attributes:
        layer: number of the decoder layer.
        expert: number of the expert.
        tokens: tokens of the sample that were routed to it.
        error: squared error of its weighted outputs over the squared norm of the layer's summed expert outputs.
    """

    layer: int
    expert: int
    tokens: int
    error: float


@dataclass(frozen=True, slots=True)
class LayerEvaluation:
    """One decoder layer.

    Attributes:
        index: number of the layer.
        module: its name in transformers' class.
        drift: relative error of the hidden states after it, INT8 model against baseline: the accumulated error.
        cosine: cosine similarity of the same.
        own: relative error of its output on the baseline's hidden states: the layer's own error.
        routing_changed: share of tokens that choose different experts than in the baseline; None without experts.
        load: tokens that each expert receives in the INT8 model; empty without experts.
    """

    index: int
    module: str
    drift: float
    cosine: float
    own: float
    routing_changed: float | None
    load: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Ablation:
    """The model with one layer, or one expert of it, left as in the baseline.

    Attributes:
        index, module: the layer.
        expert: the expert; None for the whole layer.
        kl: mean KL divergence then.
        share: the part of the model's mean KL divergence that goes, at most 1; negative if it grows.
    """

    index: int
    module: str
    expert: int | None
    kl: float
    share: float


@dataclass(frozen=True, slots=True)
class Evaluation:
    """The cost of quantization.

    Attributes:
        model, unquantized: as given; ``unquantized`` may be None.
        scheme: INT8 scheme of the model; None for a model in floats.
        tokens_from: file of the text or token ids.
        windows, window, scored: number of windows, their length, and how many tokens were scored.
        device: where it ran.
        perplexity: ``int8``, ``dequantized`` and ``unquantized``; None for what was not run.
        baseline: the model that INT8 is compared with: ``unquantized``, or ``dequantized`` if that is not given.
        int8: divergence of the INT8 model from the baseline.
        dequantized: divergence of the dequantized model from the unquantized one: the cost of rounding the weights.
        layers: layer by layer.
        experts: the worst experts.
        ablations: the worst layers and experts, each left unquantized.
        float_experts: MoE layers whose experts are stored in float, and ran in float.
        float_linears: int8 linears that ran in float: the head, and modules of classes that are not linears.
        positions: the longest window that the model is built for, by its config; None where that does not say.
        config_differences: settings that the two models compute with and that differ.
        limits: bounds of the caller.
    """

    model: str
    unquantized: str | None
    scheme: str | None
    tokens_from: str
    windows: int
    window: int
    scored: int
    device: str
    perplexity: dict[str, Perplexity | None]
    baseline: str
    int8: Divergence | None
    dequantized: Divergence | None
    layers: tuple[LayerEvaluation, ...]
    experts: tuple[ExpertError, ...] = ()
    ablations: tuple[Ablation, ...] = ()
    float_experts: tuple[str, ...] = ()
    float_linears: tuple[str, ...] = ()
    positions: int | None = None
    config_differences: tuple[str, ...] = ()
    limits: Limits = field(default_factory=Limits)

    @property
    def exceeded(self) -> list[str]:
        """Messages about the bounds that are exceeded."""
        found = []
        kl, agreement = self.limits.max_kl, self.limits.min_agreement
        if kl is not None and self.int8 is not None and self.int8.mean > kl:
            found.append(f"mean KL divergence {self.int8.mean:.4g} exceeds --max-kl {kl:g}")
        if agreement is not None and self.int8 is not None and self.int8.top1 < agreement:
            found.append(f"top-1 agreement {self.int8.top1:.4f} is below --min-agreement {agreement:g}")
        return found

    @property
    def ok(self) -> bool:
        """True when every bound of the caller is kept."""
        return not self.exceeded

    @property
    def verdict(self) -> str:
        """One line for people."""
        if self.exceeded:
            return "; ".join(self.exceeded)
        if self.int8 is None:
            return "Evaluated in float: the checkpoint holds no INT8 modules"
        bounded = self.limits.max_kl is not None or self.limits.min_agreement is not None
        return "Within the limits" if bounded else "Evaluated"

    @property
    def remarks(self) -> list[str]:
        """Messages about what makes the figures mean less."""
        found = []
        if self.float_experts:
            layers = plural(len(self.float_experts), "MoE layer")
            found.append(f"{layers} with experts stored in float, evaluated in float: {self.float_experts[0]}")
        if self.float_linears:
            found.append(
                f"{plural(len(self.float_linears), 'int8 linear')} evaluated in float: {self.float_linears[0]}"
            )
        if self.positions is not None and self.window > self.positions:
            found.append(f"windows of {self.window:,} tokens are longer than the model's {self.positions:,} positions")
        if self.config_differences:
            found.append(f"the two models have different settings: {'; '.join(self.config_differences)}")
        return found

    @property
    def worst_layers(self) -> list[LayerEvaluation]:
        """The layers with the largest errors of their own, worst first."""
        return sorted(self.layers, key=lambda layer: -layer.own)[:WORST]

    def to_json(self) -> dict[str, Any]:
        """The object that ``evaluate --json`` prints."""
        return {
            "schema": SCHEMA,
            "model": self.model,
            "unquantized": self.unquantized,
            "scheme": self.scheme,
            "tokens_from": self.tokens_from,
            "windows": self.windows,
            "window": self.window,
            "scored_tokens": self.scored,
            "device": self.device,
            "perplexity": {name: None if value is None else value.to_json() for name, value in self.perplexity.items()},
            "baseline": self.baseline,
            **_divergence(self.int8),
            "dequantized": _divergence(self.dequantized) if self.dequantized else None,
            "layers": [asdict(layer) for layer in self.layers],
            "worst": {
                "layers": [layer.index for layer in self.worst_layers],
                "experts": [asdict(expert) for expert in self.experts],
            },
            "ablations": [asdict(item) for item in self.ablations],
            "float_experts": list(self.float_experts),
            "float_linears": list(self.float_linears),
            "positions": self.positions,
            "config_differences": list(self.config_differences),
            "limits": asdict(self.limits),
            "exceeded": self.exceeded,
            "ok": self.ok,
        }


def _divergence(found: Divergence | None) -> dict[str, Any]:
    if found is None:
        return {"kl": None, "agreement": None, "rms_dp": None}
    kl = {"mean": found.mean, "median": found.median, "p99": found.p99, "max": found.max}
    return {
        "kl": {**kl, "standard_error": found.standard_error},
        "agreement": {"top1": found.top1},
        "rms_dp": found.rms_dp,
    }
