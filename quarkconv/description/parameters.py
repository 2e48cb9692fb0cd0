"""Tensors that are neither a weight, nor a bias, nor a companion of these: the model's own parameters, and all others.

A tensor that the model does not have changes what it computes in an unknown way: a rotation matrix, or the attention
sinks of a fork. Weights packed in fewer bits are known, and are not INT8.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from quarkconv.experts.naming import EXPERT_MODULES
from quarkconv.experts.topology import Topology
from quarkconv.findings import Finding, FindingsAbout
from quarkconv.scheme.companions import OUTPUT_SCALES
from quarkconv.scheme.form import BLOCK_SCALE, ROTATION
from quarkconv.scheme.stored import StoredModules
from quarkconv.text import plural

_PACKED: Final = frozenset({"qweight", "weight_packed", "_data", "_weight_qdata", "bitmask", "compressed"})
"""Last parts of the names of packed weights: of GPTQ and AWQ, compressed-tensors, quanto, torchao."""
_BESIDE_PACKED: Final = frozenset({
    "qzeros", "scales", "g_idx", "weight_g_idx", "weight_shape", "_scale", "weight_scale", "weight_zero_point",
})  # fmt: skip
"""Last parts of the names of tensors beside these."""

_PARAMETERS: Final = frozenset({
    "A_log", "D", "dt_bias",  # Mamba, and linear attention
    "sinks", "attn_sink", "attention_sink_bias",  # gpt_oss, deepseek_v4, mimo_v2
    "e_score_correction_bias", "expert_bias", "router_bias", "tid2eid", "scale", "per_expert_scale",  # routers
    "weight_1",  # ernie4_5_vl_moe: the router of images, mlp.gate.weight_1
    "layer_scalar", "per_dim_scale", "attn_layer_scale", "ffn_layer_scale",  # gemma4, qwen3_next
    "base", "fn", "hc_base", "hc_fn", "hc_scale",  # hyper connections of deepseek_v4, glm5_next
    *(f"hc_{part}_{leaf}" for part in ("attn", "ffn", "head") for leaf in ("base", "fn", "scale")),
    "ape", "position_bias", "index_kpool_compress_ape", "index_kpool_compress_gate",  # their compressors
    "inv_freq", "cos_cached", "sin_cached", "masked_bias",  # buffers that engines skip
})  # fmt: skip
"""Last parts of the names of the other parameters of decoder layers: ``nn.Parameter`` of the classes that
:mod:`quarkconv.experts.families` names, in transformers 5.24 and vLLM 0.33, and published names of them."""


def packed_weights(stored: StoredModules, topology: Topology) -> FindingsAbout:
    """The finding about packed weights of linears; those of experts have one of their own."""
    names = [name for name in stored.plain if _leaf(name) in _PACKED and name not in topology.unread]
    kinds = ", ".join(sorted({_leaf(name) for name in names}))
    return FindingsAbout(
        "scheme-unsupported",
        names,
        f"{plural(len(names), 'weight')} in a packed format ({kinds})",
        hint="quarkconv converts symmetric INT8 W8A8 only",
    )


def unknown_parameters(stored: StoredModules, topology: Topology) -> Iterator[Finding]:
    """The finding about tensors of the decoder layers that no model of a known family has.

    Those beside int8 weights, and of experts, have findings of their own.
    """
    names = [
        name
        for name in _of_decoders(stored, topology)
        if not _is_known(name, stored) and not _is_of_experts(name, topology)
    ]
    yield from FindingsAbout(
        "tensor-unrecognised",
        names,
        f"{plural(len(names), 'tensor')} that models of this kind do not have",
        hint="conversion copies them as they are; engines may drop them, fail, or compute something else",
    )


def _of_decoders(stored: StoredModules, topology: Topology) -> Iterator[str]:
    """Names of the tensors in the stacks of the MoE layers, directly in what holds such a stack, or in no module."""
    stacks = {stack for layer in topology.layers if (stack := layers_of(layer.moe)) is not None}
    inside = tuple(f"{stack}." for stack in stacks)
    holders = {stack.rpartition(".")[0] for stack in stacks} | {""}
    if stacks:
        yield from (name for name in stored.plain if name.startswith(inside) or name.rpartition(".")[0] in holders)


def layers_of(moe: str) -> str | None:
    """The stack of layers that an MoE layer is in: ``model.layers`` for ``model.layers.3.mlp``; None without one."""
    parts = moe.split(".")
    number = next((place for place, part in enumerate(parts) if part.isdecimal()), 0)
    return ".".join(parts[:number]) if number else None


def _is_known(name: str, stored: StoredModules) -> bool:
    """Whether a tensor is a parameter of a model, or belongs to a module that other findings are about."""
    module, _, leaf = name.rpartition(".")
    form = stored.linears.get(module)
    return (
        leaf in _PARAMETERS
        or leaf in _PACKED
        or is_beside_packed(name, stored)
        or name in stored.biases
        or name in stored.fused
        or (form is not None and not form.is_float)  # beside codes, of int8 or another dtype
        or name.endswith((BLOCK_SCALE, ROTATION, *OUTPUT_SCALES))
        or stored.tensors[name].dtype == "I8"  # named as tensors with codes
    )


def is_beside_packed(name: str, stored: StoredModules) -> bool:
    """Whether a tensor belongs to a packed weight: its scales, zero points, order of columns or shape."""
    module, _, leaf = name.rpartition(".")
    return leaf in _BESIDE_PACKED and any(f"{module}.{packed}" in stored.tensors for packed in _PACKED)


def _is_of_experts(name: str, topology: Topology) -> bool:
    return name in topology.unread or name in topology.members or _among(name, EXPERT_MODULES)


def _among(name: str, ends: Iterable[str]) -> bool:
    return any(f"{end}." in name for end in ends)


def _leaf(name: str) -> str:
    return name.rpartition(".")[2]
