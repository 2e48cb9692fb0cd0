"""From quantization_config to the declared scheme."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from quarkconv.scheme.declared import ConfigProblem, DeclaredScheme, UnknownScheme
from quarkconv.scheme.formats.compressed_tensors import CompressedTensorsScheme
from quarkconv.scheme.formats.quark import QuarkScheme
from quarkconv.scheme.formats.w8a8_int8 import W8A8Int8Scheme
from quarkconv.text import shortened, shown

READERS: Final[dict[str, Callable[[dict[str, Any]], DeclaredScheme]]] = {
    "quark": QuarkScheme,
    "compressed-tensors": CompressedTensorsScheme,
    "w8a8_int8": W8A8Int8Scheme,
}
"""``quant_method`` -> reader. A new config format is one row."""


def _usual(method: str) -> str:
    """A method as engines compare it: in small letters, and without the underscore of ``compressed_tensors``."""
    return method.lower().replace("compressed_tensors", "compressed-tensors")


def declared_scheme(quantization: object) -> DeclaredScheme | None:
    """The scheme that a quantization_config declares; None for None. An unknown ``quant_method`` declares nothing."""
    if quantization is None:
        return None
    if not isinstance(quantization, dict):
        unknown = UnknownScheme("unknown")
        unknown.problems.append(ConfigProblem("quantization_config", "an object", shown(quantization)))
        return unknown
    method = quantization.get("quant_method")
    if not isinstance(method, str):
        unknown = UnknownScheme("unknown")
        unknown.problems.append(ConfigProblem("quant_method", "a string", shown(method)))
        return unknown
    reader = READERS.get(_usual(method))
    return reader(quantization) if reader else UnknownScheme(shortened(method))
