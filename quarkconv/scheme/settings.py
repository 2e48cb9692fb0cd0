"""The fields of a quantization_config: those on weights and activations, others that are understood, and the rest."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from quarkconv.text import shortened

_OF_WEIGHTS: Final = {
    "quark": "quant_method quant_mode version global_quant_config layer_quant_config layer_type_quant_config exclude "
    "export kv_cache_quant_config",
    "compressed-tensors": "quant_method version format quantization_status config_groups ignore kv_cache_scheme "
    "global_compression_ratio",
    "w8a8_int8": "quant_method ignore activation_scheme bits group_size",
}
OF_WEIGHTS: Final = {method: frozenset(fields.split()) for method, fields in _OF_WEIGHTS.items()}
"""Method -> fields on weights and activations, which the stored tensors show; fields without a meaning for the
computation; and those of the key-value cache, which are compared separately."""

_UNDERSTOOD: Final[Mapping[str, frozenset[str]]] = {
    "quark": frozenset({"algo_config", "softmax_quant_spec", "kv_cache_post_rope"}),
    "compressed-tensors": frozenset({"transform_config"}),
}
"""Method -> fields that change the computation, each with checks of its own."""
_ALGORITHMS: Final = frozenset(
    {"smooth", "smoothquant", "autosmoothquant", "awq", "gptq", "gptaq", "qronos", "rotation", "quarot"}
)
"""Algorithms of Quark that only choose weights, or rotate: rotations at run time are found by their settings."""
_DENSE: Final = "dense"


def is_set(value: object) -> bool:
    """Whether a setting has a value that may change something."""
    return value not in (None, False, "", [], {})


def is_dense(value: object) -> bool:
    """Whether a ``sparsity_config`` is that of dense weights."""
    return isinstance(value, dict) and value.get("format") == _DENSE


def unknown_settings(method: str, quantization: object) -> Iterator[str]:
    """The fields that are set and that may change the computation in an unknown way.

    Args:
        method: of a reader of this project.
        quantization: the quantization_config.
    """
    if not isinstance(quantization, dict) or method not in OF_WEIGHTS:
        return
    known = OF_WEIGHTS[method] | _UNDERSTOOD.get(method, frozenset())
    for key, value in quantization.items():
        if key not in known and is_set(value) and not is_dense(value):
            yield shortened(key)
    if method == "quark":
        yield from (f"algo_config {shortened(str(name))}" for name in _unknown_algorithms(quantization))


def _unknown_algorithms(quantization: Mapping[str, Any]) -> Iterator[object]:
    algorithms = quantization.get("algo_config")
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        name = algorithm.get("name") if isinstance(algorithm, dict) else algorithm
        if is_set(algorithm) and name not in _ALGORITHMS:
            yield name
