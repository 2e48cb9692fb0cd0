"""Names of the tensors beside a weight that describe activations: of inputs, of outputs, of the key-value cache.

Quark stores the scale of a cached output with the projection, ``self_attn.k_proj.output_scale``. Engines look for
``self_attn.k_scale`` and know it under the names that other tools write: ``self_attn.k_proj.k_scale`` (ModelOpt),
``self_attn.qkv_proj.k_scale``, ``self_attn.attn.k_scale``, ``self_attn.k_cache.scale``, ``self_attn.kv_scale``
(``maybe_remap_kv_scale_name`` of vLLM 0.33). vLLM fails on any other.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Final

OUTPUT_TENSORS: Final = ("output_scale", "output_zero_point")
"""Tensors of a quantized output, under its module."""

CACHE_SCALES: Final = {"k_proj": "k_scale", "v_proj": "v_scale"}
"""Projection whose output the key-value cache holds -> name of its scale in engines, under the attention module."""

CACHE_MODULES: Final = tuple(f"*{projection}" for projection in CACHE_SCALES)
"""The same projections as patterns of a Quark config."""

_IN_ENGINES: Final = {f".{projection}.output_scale": f".{scale}" for projection, scale in CACHE_SCALES.items()}
_CACHE: Final = (".k_scale", ".v_scale", ".kv_scale", ".k_cache.scale", ".v_cache.scale")
"""Ends of the names of scales of keys and values, below the attention or a projection of it."""
_OF_CACHE: Final = re.compile(
    r"(?:\.(?:mla_)?attn)*(?:\.(?:[kv]|qkv|qkqkv)_proj)?\.(?:(?P<a>[kv])_scale|(?P<b>[kv])_cache\.scale)$"
)
ATTENTION_SCALES: Final = (
    *_CACHE, ".prob_output_scale", ".q_scale", ".q.scale", ".prob_scale",
    ".k_zero_point", ".v_zero_point", ".q_zero_point",
)  # fmt: skip
"""Scales of the attention itself: of its keys, values, queries and probabilities."""

OUTPUT_SCALES: Final = (*OUTPUT_TENSORS, *ATTENTION_SCALES)
"""Suffixes of tensors that describe an output. Each belongs to a setting, and is useless without it."""

_OF_ACTIVATIONS: Final = ("input_scale", "input_zero_point", *OUTPUT_SCALES)


def describes_activations(name: str) -> bool:
    """Whether a tensor is a scale or zero point of activations, which a model without quantization does not have."""
    return name.endswith(_OF_ACTIVATIONS)


def is_cache_scale(name: str) -> bool:
    """True for a scale of the key-value cache that engines have a name for: of keys or values, under any name."""
    return name.endswith((*_IN_ENGINES, *_CACHE))


def output_companions(module: str) -> Iterator[str]:
    """Names of the tensors of a module's quantized output."""
    yield from (f"{module}.{leaf}" for leaf in OUTPUT_TENSORS)


def name_in_engines(name: str) -> str:
    """The name that engines have for a tensor; it differs for cache scales as Quark stores them."""
    for quark, engine in _IN_ENGINES.items():
        if name.endswith(quark):
            return name.removesuffix(quark) + engine
    return name


def name_in_quark(name: str) -> str:
    """The name that Quark has for a tensor; it differs for the scale of keys, or of values, as others store it."""
    found = _OF_CACHE.search(name) if name.endswith(_CACHE) else None
    if found is None:
        return name
    return f"{name[: found.start()]}.{found['a'] or found['b']}_proj.output_scale"
