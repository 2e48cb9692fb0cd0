"""A twin of Qwen3MoeForCausalLM in float64, INT8 or not: numpy and the safetensors file, nothing of quarkconv.

Every operation is in float64. Sums of codes stay below 2^53, so they are exact; codes are rounded half to even, as
numpy rounds.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file

Array = np.ndarray[Any, np.dtype[np.float64]]
Numbers = np.ndarray[Any, np.dtype[np.integer[Any]]]


@dataclass(frozen=True)
class Twin:
    """A checkpoint by Quark, of codes ``weight`` and a scale for each row ``weight_scale``; or in floats.

    Attributes:
        config: config.json.
        tensors: name -> float64.
        int8: activations are rounded to 8 bits per token before each int8 product, and experts take and give bfloat16,
            as INT8 kernels do. False: the dequantized model, whose weights are rounded to bfloat16.
        left_out: layer and expert, or None for the whole layer -> the twin, in floats, that computes it.
    """

    config: dict[str, Any]
    tensors: dict[str, Array]
    int8: bool
    left_out: dict[tuple[int, int | None], Twin] = field(default_factory=dict)

    @classmethod
    def of(cls, folder: Path, *, int8: bool, left_out: dict[tuple[int, int | None], Twin] | None = None) -> Twin:
        config = json.loads((folder / "config.json").read_text("utf-8"))
        stored: dict[str, torch.Tensor] = {}
        for file in folder.glob("*.safetensors"):
            stored |= load_file(file)
        return cls(config, {name: tensor.double().numpy() for name, tensor in stored.items()}, int8, left_out or {})

    def logits(self, ids: Array) -> Array:
        """Logits [B, L, V] of tokens [B, L]."""
        states = self.embed(ids)
        for layer in range(self.config["num_hidden_layers"]):
            states = self.layer(layer, states)[0]
        logits: Array = self.norm("model.norm", states) @ self.tensors["lm_head.weight"].T
        return logits

    def embed(self, ids: Array) -> Array:
        """Hidden states [B, L, H] before the first layer."""
        states: Array = self.tensors["model.embed_tokens.weight"][ids]
        return states

    def layer(self, layer: int, states: Array) -> tuple[Array, Numbers]:
        """Hidden states after a layer, and the experts that each token chooses, [B * L, k]."""
        prefix = f"model.layers.{layer}"
        twin = self.left_out.get((layer, None), self)
        states = states + twin.attention(f"{prefix}.self_attn", twin.norm(f"{prefix}.input_layernorm", states))
        inputs = twin.norm(f"{prefix}.post_attention_layernorm", states)
        chosen, shares = twin.route(f"{prefix}.mlp", inputs.reshape(-1, inputs.shape[-1]))
        return states + twin.moe(layer, f"{prefix}.mlp", inputs, chosen, shares), chosen

    def norm(self, name: str, states: Array) -> Array:
        """RMSNorm over the last axis."""
        mean = np.square(states).mean(-1, keepdims=True)
        normed: Array = states / np.sqrt(mean + self.config["rms_norm_eps"]) * self.tensors[f"{name}.weight"]
        return normed

    def linear(self, name: str, states: Array) -> Array:
        """W8A8: per-token codes, exact sums, scales. A weight without scales is multiplied as it is."""
        if f"{name}.weight_scale" not in self.tensors:
            plain: Array = states @ self.tensors[f"{name}.weight"].T
            return plain
        codes, scale = self.tensors[f"{name}.weight"], self.tensors[f"{name}.weight_scale"].reshape(-1)
        if not self.int8:
            unrounded: Array = states @ bfloat16(codes * scale[:, None]).T
            return unrounded
        single = states.astype(np.float32)  # the format's codes are those of float32: many quotients are ties
        step = np.abs(single).max(-1, keepdims=True, initial=0) / np.float32(127)
        rounded = np.clip(np.round(single / np.where(step > 0, step, 1)), -127, 127).astype(np.float64)
        product: Array = (rounded @ codes.T) * step * scale
        return product

    def attention(self, name: str, states: Array) -> Array:
        """Causal attention with grouped keys and values, norms of queries and keys, rotary positions."""
        size, length = self.config["head_dim"], states.shape[1]
        q, k, v = (
            self.linear(f"{name}.{part}_proj", states).reshape(*states.shape[:2], -1, size).swapaxes(1, 2)
            for part in "qkv"
        )
        q, k = self.rotary(self.norm(f"{name}.q_norm", q)), self.rotary(self.norm(f"{name}.k_norm", k))
        groups = q.shape[1] // k.shape[1]
        k, v = k.repeat(groups, 1), v.repeat(groups, 1)
        scores = q @ k.swapaxes(-1, -2) / np.sqrt(size)
        scores = np.where(np.tri(length, dtype=bool), scores, -np.inf)
        mixed = softmax(scores) @ v
        return self.linear(f"{name}.o_proj", mixed.swapaxes(1, 2).reshape(*states.shape[:2], -1))

    def rotary(self, states: Array) -> Array:
        """Rotary positions on [B, heads, L, size]: halves are the two coordinates."""
        size, length = states.shape[-1], states.shape[-2]
        base = self.config["rope_parameters"]["rope_theta"]
        angles = np.arange(length)[:, None] / base ** (np.arange(0, size, 2) / size)
        angles = np.concatenate([angles, angles], -1)
        first, second = np.split(states, 2, -1)
        turned: Array = states * np.cos(angles) + np.concatenate([-second, first], -1) * np.sin(angles)
        return turned

    def route(self, name: str, tokens: Array) -> tuple[Numbers, Array]:
        """Softmax, the largest k, renormalised: experts and weights, [M, k]."""
        weights = softmax(tokens @ self.tensors[f"{name}.gate.weight"].T)
        chosen = np.argsort(-weights, -1, kind="stable")[:, : self.config["num_experts_per_tok"]]
        shares = np.take_along_axis(weights, chosen, -1)
        return chosen, shares / shares.sum(-1, keepdims=True)

    def moe(self, layer: int, name: str, states: Array, chosen: Numbers, shares: Array) -> Array:
        """SwiGLU experts, weighted."""
        tokens = states.reshape(-1, states.shape[-1])
        inputs = self.narrow(tokens)
        output, added = np.zeros_like(tokens), np.zeros_like(tokens)
        for expert in range(len(self.tensors[f"{name}.gate.weight"])):
            rows, slots = np.nonzero(chosen == expert)
            prefix, other = f"{name}.experts.{expert}", self.left_out.get((layer, expert))
            if other is not None:
                added[rows] += other.expert(prefix, tokens[rows]) * shares[rows, slots][:, None]
            else:
                output[rows] += self.expert(prefix, inputs[rows]) * shares[rows, slots][:, None]
        return (self.narrow(output) + added).reshape(states.shape)

    def expert(self, name: str, inputs: Array) -> Array:
        """SwiGLU."""
        gate = self.linear(f"{name}.gate_proj", inputs)
        inner = gate / (1 + np.exp(-gate)) * self.linear(f"{name}.up_proj", inputs)
        return self.narrow(self.linear(f"{name}.down_proj", self.narrow(inner)))

    def narrow(self, values: Array) -> Array:
        """What experts in INT8 take and give: bfloat16."""
        return bfloat16(values) if self.int8 else values


def bfloat16(values: Array) -> Array:
    """Rounded to 8 bits of mantissa, half to even."""
    mantissa, exponent = np.frexp(values)
    return np.ldexp(np.round(mantissa * 256) / 256, exponent)


def softmax(values: Array) -> Array:
    """Over the last axis."""
    powers = np.exp(values - values.max(-1, keepdims=True))
    result: Array = powers / powers.sum(-1, keepdims=True)
    return result
