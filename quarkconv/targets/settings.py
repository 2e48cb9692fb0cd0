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
from quarkconv.scheme.settings import other_settings
from quarkconv.text import shortened

KV_CACHE: Final = "kv_cache"
"""The quantization of the key-value cache, under whatever name a config has it."""


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
            hint="check whether the model needs it; the weights do not depend on it",
        )


def _settings(description: Description) -> Iterator[tuple[str, Any]]:
    """Name and value of every setting that the stored tensors do not show and that is set."""
    declared = description.declared
    if declared is None:
        return
    yield from other_settings(declared.method, description.config.quantization, declared.kv_cache_modules)
    if declared.kv_cache is not None:
        yield KV_CACHE, declared.kv_cache.to_json()
