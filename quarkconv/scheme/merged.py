"""Linears that engines merge into one when they load a model."""

from __future__ import annotations

from typing import Final

MERGED: Final[dict[tuple[str, ...], tuple[str, ...]]] = {
    ("q_proj", "k_proj", "v_proj"): ("qkv_proj",),
    ("gate_proj", "up_proj"): ("gate_up_proj",),
    ("w1", "w3"): ("gate_up_proj",),
    ("q_a_proj", "kv_a_proj_with_mqa"): ("fused_qkv_a_proj", "fused_qkv_a_proj_with_mqa"),
    ("wq_a", "wkv"): ("fused_wqa_wkv", "wqkv_a"),
    ("in_proj_qkv", "in_proj_z"): ("in_proj_qkvz",),
    ("in_proj_b", "in_proj_a"): ("in_proj_ba",),
}
"""Parts -> names of the merged linear, in vLLM and in SGLang. vLLM expands the merged name to its parts; SGLang has no
such table for some models and looks up the merged name, so a list of modules needs both."""

MERGED_WITH: Final = {part: (parts, merged) for parts, merged in MERGED.items() for part in parts}
"""Part -> all parts of its merged linear, and the names of that."""
