"""The scheme that SGLang's ``w8a8_int8`` config declares: per-channel weights, per-token activations.

Source: SGLang, ``srt/layers/quantization/w8a8_int8.py``.
"""

from __future__ import annotations

from typing import Any

from quarkconv.scheme.declared import DeclaredScheme
from quarkconv.scheme.patterns import TimeLimit
from quarkconv.scheme.spec import FLOAT, PTPC, ModuleScheme


class W8A8Int8Scheme(DeclaredScheme):
    """A ``quantization_config`` with ``quant_method: w8a8_int8``: per-channel weights, per-token activations."""

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__("w8a8_int8", None)
        self.default = PTPC
        self.lists_float = "ignore" in config
        self._ignored = self._filter(config.get("ignore"), "ignore", limit=TimeLimit())

    def resolve(self, module: str) -> ModuleScheme:
        return FLOAT if self._ignored(module) else self.default
