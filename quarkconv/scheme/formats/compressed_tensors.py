"""The scheme that a compressed-tensors config declares for each module.

Source: https://github.com/vllm-project/compressed-tensors, ``quantization/quant_config.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import islice
from typing import Any, ClassVar

from quarkconv.scheme.companions import CACHE_MODULES
from quarkconv.scheme.declared import DeclaredScheme
from quarkconv.scheme.patterns import TimeLimit
from quarkconv.scheme.spec import (
    FLOAT,
    INPUT_STATIC,
    PER_CHANNEL,
    PER_TENSOR,
    PER_TOKEN,
    SCHEME_NAMES,
    WEIGHT_PER_CHANNEL,
    ModuleScheme,
    TensorSpec,
)
from quarkconv.text import shortened, word

LINEAR_TYPE = "Linear"
"""The class that a group names to mean every linear that no group names."""

_PACKED = ("pack-quantized", "marlin-24")
"""Formats in which weights are stored as ``weight_packed``, several codes to an int32: engines look for that."""
_QUANTIZED = ("int-quantized", "naive-quantized", "float-quantized")
"""Formats under which engines quantize activations (``is_activation_quantization_format`` of vLLM 0.33); under others
they find no scheme for linears with int8 activations."""
_MAX_GROUPS = 1_000
_GRANULARITY = {"channel": PER_CHANNEL, "tensor": PER_TENSOR, "token": PER_TOKEN}


class CompressedTensorsScheme(DeclaredScheme):
    """A ``quantization_config`` with ``quant_method: compressed-tensors``.

    Here a scale per tensor is stored as one for each row, so static activations go with either.
    """

    names: ClassVar[Mapping[ModuleScheme, str]] = {
        **SCHEME_NAMES,
        ModuleScheme(WEIGHT_PER_CHANNEL, INPUT_STATIC): "int8_static",
    }

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__("compressed-tensors", None)
        limit = TimeLimit()
        self._groups: list[tuple[Callable[[str], object], ModuleScheme]] = []
        groups = self._object(config.get("config_groups"), "config_groups")
        if len(groups) > _MAX_GROUPS:
            self._problem("config_groups", f"at most {_MAX_GROUPS} groups", groups)
        for key, value in islice(groups.items(), _MAX_GROUPS):
            key = shortened(key)
            group = self._object(value, f"config_groups.{key}")
            weights = self._spec(group.get("weights"), f"config_groups.{key}.weights")
            form = group.get("format") or config.get("format")
            if weights is not None and form in _PACKED:
                weights = weights._replace(dtype=f"{weights.dtype} packed")
            inputs = self._spec(group.get("input_activations"), f"config_groups.{key}.input_activations")
            scheme = ModuleScheme(weights, inputs)
            if scheme in self.names and form not in _QUANTIZED:
                where = f"config_groups.{key}.format" if group.get("format") else "format"
                self._problem(where, "int-quantized", form)
            where, targets = f"config_groups.{key}.targets", group.get("targets")
            self._groups.append((self._filter(targets, where, limit=limit, merged=True), scheme))
            if isinstance(targets, list) and LINEAR_TYPE in targets and self.default == FLOAT:
                self.default = scheme
        self._ignored = self._filter(config.get("ignore"), "ignore", limit=limit, merged=True)
        kv_cache = self._spec(config.get("kv_cache_scheme"), "kv_cache_scheme")
        if kv_cache is not None:
            self.kv_cache = kv_cache
            self.kv_cache_modules = CACHE_MODULES

    def resolve(self, module: str) -> ModuleScheme:
        if self._ignored(module):
            return FLOAT
        for named, scheme in self._groups:
            if named(module):
                return scheme
        return self.default

    def resolve_expert(self, experts: str, module: str) -> ModuleScheme:
        return FLOAT if self._ignored(experts) else self.resolve(module)

    def _spec(self, value: object, where: str) -> TensorSpec | None:
        """Parse one ``QuantizationArgs``, with its defaults; names are read in any case."""
        if value is None:
            return None
        spec = self._object(value, where)
        kind, bits, dynamic = spec.get("type", "int"), spec.get("num_bits", 8), spec.get("dynamic", False)
        if not isinstance(kind, str) or not isinstance(bits, int):
            self._problem(where, "type a string and num_bits a number", value)
            return None
        strategy = spec.get("strategy")
        if strategy is None:
            size = spec.get("group_size")
            strategy = "tensor" if size is None else "channel" if size == -1 else "group"
        strategy = word(strategy).lower()
        dtype = word(f"{kind.lower()}{bits}")
        return TensorSpec(
            "fp8_e4m3" if dtype == "float8" else dtype,
            _GRANULARITY.get(strategy, strategy),
            symmetric=spec.get("symmetric", True) is True,
            dynamic=dynamic in (True, "local"),  # local: of each group, beside a static scale of the tensor
        )
