"""Which modules a config must name as not quantized."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from quarkconv.description.contradictions import is_linear
from quarkconv.description.description import Description
from quarkconv.experts.naming import NAMINGS

MERGED: Final[dict[tuple[str, ...], tuple[str, ...]]] = {
    ("q_proj", "k_proj", "v_proj"): ("qkv_proj",),
    ("gate_proj", "up_proj"): ("gate_up_proj",),
    ("w1", "w3"): ("gate_up_proj",),
    ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    ("in_proj_qkv", "in_proj_z"): ("in_proj_qkvz",),
    ("in_proj_b", "in_proj_a"): ("in_proj_ba",),
}
"""Linears that engines merge into one at load -> names of the merged linear, in vLLM and in SGLang. vLLM expands the
merged name to its parts; SGLang has no such table for some models and looks up the merged name, so both are
listed."""

_MERGED_WITH: Final = {part: (parts, merged) for parts, merged in MERGED.items() for part in parts}


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
        parts, merged = _MERGED_WITH.get(leaf, ((), ()))
        if not quantized.intersection(f"{head}.{part}" for part in parts):
            yield from (f"{head}.{name}" for name in merged)
    for layer in topology.layers:
        if not layer.quantized:
            yield layer.prefix
            for leaf in NAMINGS[0].projections():  # vLLM and SGLang look these up under every naming
                yield f"{layer.prefix}.0.{leaf}"
