"""The settings of a quantization_config: those of weights and activations, others that are checked, and the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator
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

_ALGORITHMS: Final = frozenset(
    {"smooth", "smoothquant", "autosmoothquant", "awq", "gptq", "gptaq", "qronos", "rotation", "quarot"}
)
"""Algorithms of Quark that only choose weights, or rotate: rotations at run time are found by their settings."""
_TRANSFORMS: Final = "transform_config"
"""Field of compressed-tensors with rotations, which have checks of their own."""
_EXPORT_HISTORY: Final = frozenset(
    {"kv_cache_group", "min_kv_scale", "pack_method", "weight_format", "weight_merge_groups"}
)
"""Fields of Quark's ``export`` that record how the export was made. ``pack_method`` is about codes below 8 bits."""
_DENSE: Final = "dense"
_ARGUMENTS: Final = frozenset({
    "num_bits", "type", "symmetric", "group_size", "strategy", "block_structure", "dynamic", "actorder", "scale_dtype",
    "zp_dtype", "observer", "observer_kwargs",
})  # fmt: skip
"""Fields of a tensor in a compressed-tensors config (``QuantizationArgs`` of 0.20), which refuses others."""


def other_settings(method: str, quantization: object, cached: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Name and value of every setting that is set, beside those of weights, activations and the key-value cache.

    Args:
        method: of a reader of this project.
        quantization: the quantization_config.
        cached: name patterns of the modules whose outputs go into the key-value cache.
    """
    if not isinstance(quantization, dict):
        return
    of_weights = OF_WEIGHTS.get(method, frozenset())
    for key, value in quantization.items():
        if key not in of_weights and _is_set(value) and not _is_dense(value):
            yield key, value
    if method == "quark":
        yield from _quark_settings(quantization, cached)
    if method == "compressed-tensors":
        for key, group in _items(quantization.get("config_groups")):
            if isinstance(group, dict) and _is_set(group.get("output_activations")):
                yield f"config_groups.{key}.output_activations", group["output_activations"]
            for part in ("weights", "input_activations") if isinstance(group, dict) else ():
                others = [item for item in _items(group.get(part)) if item[0] not in _ARGUMENTS and _is_set(item[1])]
                yield from ((f"config_groups.{key}.{part}.{field}", value) for field, value in others)


def unchecked_settings(method: str, quantization: object, cached: Collection[str]) -> Iterator[str]:
    """The names of the settings of :func:`other_settings` that may change the computation, and that nothing checks."""
    for name, value in other_settings(method, quantization, cached):
        if name == "algo_config":
            yield from (f"{name} {shortened(str(found))}" for found in _unknown_algorithms(value))
        elif name != _TRANSFORMS:
            yield shortened(name)


def _quark_settings(quantization: dict[str, Any], cached: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Settings inside the fields of a Quark config: quantized outputs and biases, and ``export``."""
    layers = [("global_quant_config", quantization.get("global_quant_config"))]
    for field in ("layer_quant_config", "layer_type_quant_config"):
        layers += [(f"{field}.{key}", layer) for key, layer in _items(quantization.get(field))]
    for field, layer in layers:
        for key in ("bias", "output_tensors"):
            is_cached = key == "output_tensors" and field.partition(".")[2] in cached
            if isinstance(layer, dict) and _is_set(layer.get(key)) and not is_cached:
                yield f"{field}.{key}", layer[key]
    for key, value in _items(quantization.get("export")):
        if key not in _EXPORT_HISTORY and _is_set(value):
            yield f"export.{key}", value


def _unknown_algorithms(algorithms: object) -> Iterator[object]:
    """The names of the algorithms that are not known."""
    for algorithm in algorithms if isinstance(algorithms, list) else [algorithms]:
        name = algorithm.get("name") if isinstance(algorithm, dict) else algorithm
        if not isinstance(name, str) or name not in _ALGORITHMS:
            yield name


def _items(value: object) -> Iterator[tuple[str, Any]]:
    yield from value.items() if isinstance(value, dict) else ()


def _is_set(value: object) -> bool:
    """Whether a setting has a value that may change something."""
    return value not in (None, False, "", [], {})


def _is_dense(value: object) -> bool:
    """Whether a ``sparsity_config`` is that of dense weights."""
    return isinstance(value, dict) and value.get("format") == _DENSE
