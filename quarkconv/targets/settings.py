"""The settings of a source's quantization_config that the stored tensors do not show, and which of them are lost.

Targets derive the settings of weights and activations from the stored tensors. Every other setting, such as a
quantized key-value cache, a rotation or quantized biases, is either carried over to the output or reported.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, Final

from quarkconv.description.description import Description
from quarkconv.experts.config import QUANTIZATION_KEY
from quarkconv.findings import Finding, finding
from quarkconv.scheme.settings import OF_WEIGHTS, is_dense, is_set
from quarkconv.text import shortened

KV_CACHE: Final = "kv_cache"
"""The quantization of the key-value cache, under whatever name a config has it."""

_EXPORT_HISTORY: Final = frozenset(
    {"kv_cache_group", "min_kv_scale", "pack_method", "weight_format", "weight_merge_groups"}
)
"""Fields of Quark's ``export`` that record how the export was made. ``pack_method`` is about codes below 8 bits."""


def dropped_settings(description: Description, target: str, *, kept: Collection[str]) -> Iterator[Finding]:
    """A finding for each setting of the source that the output does not have.

    Args:
        description: the source.
        target: name of the target.
        kept: the settings that the target writes: fields of quantization_config, whole or as ``field.key``, and
            :data:`KV_CACHE`.
    """
    kept = frozenset(kept)
    lost = {name: value for name, value in _settings(description) if kept.isdisjoint((name, name.partition(".")[0]))}
    for name, value in lost.items():
        text = repr(value)
        yield finding(
            "setting-dropped",
            f"{QUANTIZATION_KEY}.{shortened(name)}",
            f"The target {target} cannot express this setting: {text[:80]}{'...' if len(text) > 80 else ''}",
            hint="check whether the model needs it; the weights are the same without it",
        )


def _settings(description: Description) -> Iterator[tuple[str, Any]]:
    """Name and value of every setting that the stored tensors do not show and that is set."""
    quantization = description.config.quantization
    declared = description.declared
    if not isinstance(quantization, dict) or declared is None:
        return
    of_weights = OF_WEIGHTS.get(declared.method, frozenset())
    for key, value in quantization.items():
        if key not in of_weights and is_set(value) and not is_dense(value):
            yield key, value
    if declared.kv_cache is not None:
        yield KV_CACHE, declared.kv_cache.to_json()
    if declared.method == "quark":
        yield from _quark_settings(quantization, declared.kv_cache_modules)
    if declared.method == "compressed-tensors":
        for key, group in _items(quantization.get("config_groups")):
            if isinstance(group, dict) and is_set(group.get("output_activations")):
                yield f"config_groups.{key}.output_activations", group["output_activations"]


def _quark_settings(quantization: dict[str, Any], kv_modules: Collection[str]) -> Iterator[tuple[str, Any]]:
    """Settings inside the fields of a Quark config: quantized outputs and biases, and ``export``."""
    layers = [("global_quant_config", quantization.get("global_quant_config"))]
    for field in ("layer_quant_config", "layer_type_quant_config"):
        layers += [(f"{field}.{key}", layer) for key, layer in _items(quantization.get(field))]
    for field, layer in layers:
        for key in ("bias", "output_tensors"):
            of_kv_cache = key == "output_tensors" and field.partition(".")[2] in kv_modules
            if isinstance(layer, dict) and is_set(layer.get(key)) and not of_kv_cache:
                yield f"{field}.{key}", layer[key]
    for key, value in _items(quantization.get("export")):
        if key not in _EXPORT_HISTORY and is_set(value):
            yield f"export.{key}", value


def _items(value: object) -> Iterator[tuple[str, Any]]:
    yield from value.items() if isinstance(value, dict) else ()
