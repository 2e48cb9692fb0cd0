"""Scales of outputs and of the key-value cache, compared with the settings that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Final

from quarkconv.findings import Finding, FindingsAbout, finding
from quarkconv.scheme.companions import is_cache_scale
from quarkconv.scheme.declared import DeclaredScheme, UnknownScheme
from quarkconv.scheme.settings import other_settings
from quarkconv.scheme.stored import StoredModules
from quarkconv.text import plural

_SETTINGS: Final = (".output_tensors", ".output_activations", "softmax_quant_spec")
"""Ends of the names of settings that quantize outputs, of linears and of the attention."""


def output_scale_findings(
    declared: DeclaredScheme | None, quantization: object, stored: StoredModules
) -> Iterator[Finding]:
    """The findings about scales of outputs that no setting declares, and a quantized cache without its scales.

    Args:
        declared: the scheme that the config declares.
        quantization: the quantization_config.
        stored: the modules.
    """
    if declared is None or isinstance(declared, UnknownScheme):
        return
    settings = other_settings(declared.method, quantization, declared.kv_cache_modules)
    if any(name.endswith(_SETTINGS) for name, _ in settings):
        return  # which scales belong to it is not compared; a setting that nothing checks is reported as such
    names = [name for name in stored.output_scales if not _is_declared(name, declared)]
    yield from FindingsAbout(
        "output-scales",
        names,
        f"{plural(len(names), 'scale')} of outputs or of the key-value cache stored that {declared.file} does not "
        "declare",
        hint="engines ignore them, or fail: export the model again with the setting, or without the scales",
    )
    cache = declared.kv_cache
    if cache is not None and not cache.dynamic and not any(map(is_cache_scale, stored.output_scales)):
        yield finding(
            "output-scales",
            declared.subject,
            f"{declared.file} declares the key-value cache quantized with stored scales, and none is stored",
            hint="vLLM takes 1.0 for them: export the model again with these scales, or without the setting",
        )


def _is_declared(name: str, declared: DeclaredScheme) -> bool:
    """Whether a scale is one of the cache that the config declares."""
    module = name.rpartition(".")[0]
    return declared.kv_cache is not None and (
        is_cache_scale(name) or any(fnmatchcase(module, pattern) for pattern in declared.kv_cache_modules)
    )
