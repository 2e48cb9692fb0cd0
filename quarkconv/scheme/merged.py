"""Linears that engines merge into one when they load a model."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
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

_PARTS_OF: Final[dict[str, tuple[str, ...]]] = {
    name: tuple(part for parts, names in MERGED.items() if name in names for part in parts)
    for names in MERGED.values()
    for name in names
}
"""Name of a merged linear -> its parts, under all names."""


def with_parts(modules: Iterable[str]) -> Iterator[str]:
    """Module names of a list; a merged linear is followed by its parts.

    Of compressed-tensors configs, engines look up the merged name itself before they expand it
    (``should_ignore_layer`` of vLLM 0.28 to 0.33 and of SGLang 0.5.23), so that ``self_attn.qkv_proj`` in a list means
    its three parts in the files. Of Quark configs, vLLM does so from 0.31 on only.
    """
    for module in modules:
        yield module
        parent, _, leaf = module.rpartition(".")
        for part in _PARTS_OF.get(leaf, ()):
            yield f"{parent}.{part}"
