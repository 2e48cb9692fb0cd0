"""Names of the scales of a quantized key-value cache.

Quark stores them with the projection whose output is cached, ``self_attn.k_proj.output_scale``; vLLM's loader for
compressed-tensors looks for ``self_attn.k_scale`` (``maybe_remap_kv_scale_name``, 0.33) and fails on any other name.
"""

from __future__ import annotations

from typing import Final

_NAMES: Final = {".k_proj.output_scale": ".k_scale", ".v_proj.output_scale": ".v_scale"}


def name_in_engines(name: str) -> str:
    """The name of a tensor as engines want it: another one for a scale of the cache, as Quark stores it."""
    for quark, engine in _NAMES.items():
        if name.endswith(quark):
            return name.removesuffix(quark) + engine
    return name


def name_in_quark(name: str) -> str:
    """The name of a tensor as Quark stores it: another one for a scale of the cache, as engines want it."""
    for quark, engine in _NAMES.items():
        if name.endswith(engine):
            return name.removesuffix(engine) + quark
    return name
