"""From config.json to the declared scheme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from quarkconv.scheme.declared import ConfigProblem, DeclaredScheme, UnknownScheme
from quarkconv.scheme.formats.compressed_tensors import CompressedTensorsScheme
from quarkconv.scheme.formats.quark import QuarkScheme
from quarkconv.scheme.formats.w8a8_int8 import W8A8Int8Scheme
from quarkconv.text import shortened, shown

QUANTIZATION_KEY: Final = "quantization_config"

READERS: Final[dict[str, Callable[[dict[str, Any]], DeclaredScheme]]] = {
    "quark": QuarkScheme,
    "compressed-tensors": CompressedTensorsScheme,
    "w8a8_int8": W8A8Int8Scheme,
}
"""``quant_method`` -> reader. A new config format is one row."""


def declared_scheme(config: dict[str, Any]) -> DeclaredScheme | None:
    """The scheme that a config.json declares; None when it has no quantization_config.

    The config of a multimodal model may carry it in its text part. A ``quant_method`` that is not known gives a
    scheme of which nothing is known but the name.
    """
    quantization = quantization_config(config)
    return None if quantization is None else _read(quantization)


def quantization_config(config: dict[str, Any]) -> object:
    """The quantization_config of a config.json, whatever it is; None when there is none."""
    for part in (config, config.get("text_config")):
        if isinstance(part, dict) and part.get(QUANTIZATION_KEY) is not None:
            found: object = part[QUANTIZATION_KEY]
            return found
    return None


def _read(quantization: object) -> DeclaredScheme:
    if not isinstance(quantization, dict):
        unknown = UnknownScheme("unknown")
        unknown.problems.append(ConfigProblem(QUANTIZATION_KEY, "an object", type(quantization).__name__))
        return unknown
    method = quantization.get("quant_method")
    if not isinstance(method, str):
        unknown = UnknownScheme("unknown")
        unknown.problems.append(ConfigProblem("quant_method", "a string", shown(method)))
        return unknown
    reader = READERS.get(method)
    return reader(quantization) if reader else UnknownScheme(shortened(method))
