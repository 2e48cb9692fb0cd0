"""Which modules a config must name as not quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from quarkconv.contradictions import is_linear
from quarkconv.description import Description
from quarkconv.experts.naming import NAMINGS

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


def ignored_modules(description: Description) -> list[str]:
    """Every module that is not quantized, by its exact name, with the linear that engines merge it into."""
    return sorted(set(_ignored(description)))


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
