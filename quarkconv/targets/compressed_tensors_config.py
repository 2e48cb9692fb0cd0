"""The config.json of a checkpoint in the compressed-tensors form.

The fields are those of compressed-tensors' ``QuantizationConfig``; vLLM 0.28 and later raise on unknown keys inside
``weights`` and ``input_activations``, so nothing is added.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from quarkconv.contradictions import is_linear
from quarkconv.description import Description
from quarkconv.experts.geometry import TEXT_PARTS
from quarkconv.experts.naming import NAMINGS
from quarkconv.scheme.config import QUANTIZATION_KEY
from quarkconv.scheme.spec import INPUT_STATIC

FUSED_PARENTS: Final[dict[str, str]] = {
    "q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj",
    "gate_proj": "gate_up_proj", "up_proj": "gate_up_proj",
    "w1": "gate_up_proj", "w3": "gate_up_proj",
    "q_a_proj": "fused_qkv_a_proj", "kv_a_proj_with_mqa": "fused_qkv_a_proj",
    "in_proj_qkv": "in_proj_qkvz", "in_proj_z": "in_proj_qkvz",
    "in_proj_b": "in_proj_ba", "in_proj_a": "in_proj_ba",
}  # fmt: skip
"""Linears that engines merge into one at load -> name of the merged linear. vLLM expands the merged name to its parts;
SGLang has no such table for some models and looks for the merged name itself, so both are named."""


def compressed_tensors_config(description: Description) -> dict[str, Any]:
    """The source's config.json with its quantization_config replaced by the compressed-tensors form."""
    static = any(scheme.activation == INPUT_STATIC for scheme in description.schemes)
    group = {
        "targets": ["Linear"],
        "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
        "input_activations": {
            "num_bits": 8,
            "type": "int",
            "strategy": "tensor" if static else "token",
            "symmetric": True,
            "dynamic": not static,
        },
    }
    quantization = {
        "quant_method": "compressed-tensors",
        "format": "int-quantized",
        "quantization_status": "compressed",
        "config_groups": {"group_0": group},
        "ignore": ignored_modules(description),
    }
    return replace_quantization(description.checkpoint.config, quantization)


def ignored_modules(description: Description) -> list[str]:
    """Every module that is not quantized, by its exact name, with the linear that engines merge it into."""
    return sorted(set(_ignored(description)))


def replace_quantization(config: dict[str, Any], quantization: dict[str, Any] | None) -> dict[str, Any]:
    """A copy of a config with another quantization_config, at the top, or with none."""
    replaced = {key: value for key, value in config.items() if key != QUANTIZATION_KEY}
    for part in TEXT_PARTS:
        if isinstance(replaced.get(part), dict):
            replaced[part] = {key: value for key, value in replaced[part].items() if key != QUANTIZATION_KEY}
    if quantization is not None:
        replaced[QUANTIZATION_KEY] = quantization
    return replaced


def _ignored(description: Description) -> Iterator[str]:
    topology = description.topology
    quantized = {module for module, form in description.stored.linears.items() if form.quantized}
    for module, form in description.stored.linears.items():
        if not form.is_float or not is_linear(module, form):
            continue
        yield module
        if module in topology.members:
            continue
        head, _, leaf = module.rpartition(".")
        parent = FUSED_PARENTS.get(leaf)
        parts = [f"{head}.{part}" for part, merged in FUSED_PARENTS.items() if merged == parent]
        if parent is not None and not quantized.intersection(parts):
            yield f"{head}.{parent}"
    for layer in topology.layers:
        if not layer.quantized:
            yield layer.prefix
            for leaf in NAMINGS[0].projections():  # vLLM and SGLang ask about these three, whatever the names are
                yield f"{layer.prefix}.0.{leaf}"
