"""The one description of a checkpoint for tests and benchmarks: sizes and names in, tensors and config.json out.

No torch: benchmarks write models of many GB from it (:mod:`support.streaming`), tests models of a few KB
(:mod:`support.checkpoints`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, auto
from math import prod
from typing import Any, Final, NamedTuple

from support.quark_config import INPUT, STATIC_INPUT, TENSOR_WEIGHT, WEIGHT, layer_config, quark_config

INDEX: Final = "model.safetensors.index.json"
PROJECTIONS: Final = {"gate_proj": ("gate_proj", "up_proj", "down_proj"), "w1": ("w1", "w3", "w2")}
"""Family of names -> those of gate, up and down."""
FUSED: Final = {"gate_proj": ("gate_up_proj", "down_proj"), "w1": ("w13", "w2")}
"""Family of names -> those of the two tensors of fused experts."""
_ITEM_BYTES: Final = {"I8": 1, "F16": 2, "BF16": 2, "F32": 4}


def shard_name(number: int, count: int) -> str:
    """The name of shard ``number``, counted from 1."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


class Content(Enum):
    """What a tensor holds."""

    CODES = auto()
    """Integers from -127 to 127."""
    SCALES = auto()
    """Small positive numbers."""
    INPUT_SCALES = auto()
    """Small positive numbers, the same for gate and up of an expert: both read the same input."""
    ZEROS = auto()
    ONES = auto()
    NOISE = auto()
    """Finite numbers around 0."""


class TensorSpec(NamedTuple):
    """A tensor of a checkpoint: dtype as safetensors names it, shape, content."""

    dtype: str
    shape: tuple[int, ...]
    content: Content

    @property
    def nbytes(self) -> int:
        """Size of the data."""
        return _ITEM_BYTES[self.dtype] * prod(self.shape)


Specs = Iterator[tuple[str, TensorSpec]]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoeModel:
    """A mixture-of-experts model in one of Quark's INT8 schemes.

    Attributes:
        layers: all of them MoE layers.
        experts: routed experts E of each layer; a token goes to ``top_k`` of them.
        hidden: H.
        intermediate: I of each expert.
        vocabulary: rows of the embedding and of lm_head.
        query: rows of q_proj and columns of o_proj; H where None.
        key: rows of k_proj and v_proj; H where None.
        attention: which of the four linears there are.
        norms: layer norms of each layer.
        moe: name of the MoE module of a layer; where None ``mlp``, or ``moe`` for stacked experts.
        router_bias: whether the router has an e_score_correction_bias.
        model_type: that of config.json.
        layout: of the experts: ``per_expert``, ``stacked`` (three tensors [E, out, in]) or ``fused`` (two).
        family: first name of a row of :data:`PROJECTIONS`.
        granularity: of weight scales: ``per_channel`` or ``per_tensor``.
        scale_dtype: of weight scales, as safetensors names it.
        zero_points: whether there are any; they are 0.
        input_scales: whether activations are static, with one scale for each linear.
        column_scales: weight scales are [out, 1] instead of [out].
    """

    layers: int = 1
    experts: int = 3
    top_k: int = 2
    hidden: int = 24
    intermediate: int = 20
    vocabulary: int = 16
    query: int | None = None
    key: int | None = None
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    norms: tuple[str, ...] = ()
    moe: str | None = None
    router_bias: bool = False
    model_type: str = "qwen3_moe"
    layout: str = "per_expert"
    family: str = "gate_proj"
    granularity: str = "per_channel"
    scale_dtype: str = "F32"
    zero_points: bool = False
    input_scales: bool = False
    column_scales: bool = False

    def tensors(self) -> dict[str, TensorSpec]:
        """Every tensor by its name."""
        table = TensorSpec("BF16", (self.vocabulary, self.hidden), Content.NOISE)
        found = {"model.embed_tokens.weight": table, "lm_head.weight": table, "model.norm.weight": self._norm()}
        for layer in range(self.layers):
            found |= dict(self._layer(f"model.layers.{layer}"))
        return found

    def config(self) -> dict[str, Any]:
        """What config.json says."""
        weight = WEIGHT if self.granularity == "per_channel" else TENSOR_WEIGHT
        declared = layer_config(weight, STATIC_INPUT if self.input_scales else INPUT)
        return {
            "model_type": self.model_type,
            "hidden_act": "silu",
            "num_hidden_layers": self.layers,
            ("num_local_experts" if self.moe == "block_sparse_moe" else "num_experts"): self.experts,
            "num_experts_per_tok": self.top_k,
            "quantization_config": quark_config(global_quant_config=declared, exclude=["lm_head", "*.gate"]),
        }

    def linear(self, module: str, *shape: int) -> Specs:
        """The tensors of a quantized linear, or of a stack of them: ``shape`` is [out, in] or [E, out, in]."""
        weight = f"{module}.weight"
        return self._quantized(weight, f"{weight}_scale", f"{weight}_zero_point", f"{module}.input_scale", shape)

    def _norm(self) -> TensorSpec:
        return TensorSpec("BF16", (self.hidden,), Content.ONES)

    def _layer(self, head: str) -> Specs:
        hidden, moe = self.hidden, f"{head}.{self.moe or ('moe' if self.layout == 'stacked' else 'mlp')}"
        query, key = self.query or hidden, self.key or hidden
        rows = {"q_proj": query, "k_proj": key, "v_proj": key, "o_proj": hidden}
        for name in self.attention:
            yield from self.linear(f"{head}.self_attn.{name}", rows[name], query if name == "o_proj" else hidden)
        for name in self.norms:
            yield f"{head}.{name}.weight", self._norm()
        yield f"{moe}.gate.weight", TensorSpec("BF16", (self.experts, hidden), Content.NOISE)
        if self.router_bias:
            yield f"{moe}.e_score_correction_bias", TensorSpec("BF16", (self.experts,), Content.NOISE)
        yield from self._experts(moe)

    def _experts(self, moe: str) -> Specs:
        hidden, intermediate, experts = self.hidden, self.intermediate, self.experts
        *inputs, down = PROJECTIONS[self.family]
        match self.layout:
            case "per_expert":
                for expert in range(experts):
                    for name in inputs:
                        yield from self.linear(f"{moe}.experts.{expert}.{name}", intermediate, hidden)
                    yield from self.linear(f"{moe}.experts.{expert}.{down}", hidden, intermediate)
            case "stacked":
                for name in inputs:
                    yield from self.linear(f"{moe}.{name}", experts, intermediate, hidden)
                yield from self.linear(f"{moe}.{down}", experts, hidden, intermediate)
            case "fused":
                shapes = ((experts, 2 * intermediate, hidden), (experts, hidden, intermediate))
                for name, shape in zip(FUSED[self.family], shapes, strict=True):
                    weight = f"{moe}.experts.{name}"
                    scale, zero_point, input_scale = (
                        f"{weight}_{end}" for end in ("scale", "zero_point", "input_scale")
                    )
                    yield from self._quantized(weight, scale, zero_point, input_scale, shape)
            case _:
                raise ValueError(f"no such layout of experts: {self.layout}")

    def _quantized(self, weight: str, scale: str, zero_point: str, input_scale: str, shape: tuple[int, ...]) -> Specs:
        *lead, out, _ = shape
        size = (*lead, out) if self.granularity == "per_channel" else tuple(lead)
        if self.column_scales:
            size = (*size, 1) if self.granularity == "per_channel" else (*size, 1, 1)
        yield weight, TensorSpec("I8", shape, Content.CODES)
        yield scale, TensorSpec(self.scale_dtype, size, Content.SCALES)
        if self.zero_points:
            yield zero_point, TensorSpec("I8", size, Content.ZEROS)
        if self.input_scales:
            yield input_scale, TensorSpec("F32", tuple(lead), Content.INPUT_SCALES)
