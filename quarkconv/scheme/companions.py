"""Names of the tensors beside a weight that describe activations: of inputs, of outputs, of the key-value cache.

Quark stores the scale of a cached output with the projection, ``self_attn.k_proj.output_scale``. vLLM's loader for
compressed-tensors looks for ``self_attn.k_scale`` (``maybe_remap_kv_scale_name``, 0.33) and fails on any other name.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

OUTPUT_TENSORS: Final = ("output_scale", "output_zero_point")
"""Tensors of a quantized output, under its module."""

CACHE_SCALES: Final = {"k_proj": "k_scale", "v_proj": "v_scale"}
"""Projection whose output the key-value cache holds -> name of its scale in engines, under the attention module."""

CACHE_MODULES: Final = tuple(f"*{projection}" for projection in CACHE_SCALES)
"""The same projections as patterns of a Quark config."""

_IN_ENGINES: Final = {f".{projection}.output_scale": f".{scale}" for projection, scale in CACHE_SCALES.items()}
ATTENTION_SCALES: Final = (".prob_output_scale", ".q_scale", ".prob_scale")
"""Scales of the attention itself, of its queries and its probabilities."""

OUTPUT_SCALES: Final = (*OUTPUT_TENSORS, *(f".{scale}" for scale in CACHE_SCALES.values()), *ATTENTION_SCALES)
"""Suffixes of tensors that describe an output. Each belongs to a setting, and is useless without it."""

_OF_ACTIVATIONS: Final = ("input_scale", "input_zero_point", *OUTPUT_SCALES)


def describes_activations(name: str) -> bool:
    """Whether a tensor is a scale or zero point of activations, which a model without quantization does not have."""
    return name.endswith(_OF_ACTIVATIONS)


def is_cache_scale(name: str) -> bool:
    """True for a scale of the key-value cache that engines have a name for: of keys or values, under either name."""
    return name.endswith((*_IN_ENGINES, *_IN_ENGINES.values()))


def output_companions(module: str) -> Iterator[str]:
    """Names of the tensors of a module's quantized output, the engines' name of a cache scale among them."""
    yield from (f"{module}.{leaf}" for leaf in OUTPUT_TENSORS)
    attention, _, projection = module.rpartition(".")
    if projection in CACHE_SCALES:
        yield f"{attention}.{CACHE_SCALES[projection]}"


def name_in_engines(name: str) -> str:
    """The name that engines have for a tensor; it differs for cache scales as Quark stores them."""
    for quark, engine in _IN_ENGINES.items():
        if name.endswith(quark):
            return name.removesuffix(quark) + engine
    return name


def name_in_quark(name: str) -> str:
    """The name that Quark has for a tensor; it differs for cache scales as engines want them."""
    for quark, engine in _IN_ENGINES.items():
        if name.endswith(engine):
            return name.removesuffix(engine) + quark
    return name
