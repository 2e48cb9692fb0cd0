"""The scheme that a Quark config declares for each module.

Quark decides by module name (the tensor's name without ``.weight``), in this order: ``exclude``; the first key of
``layer_quant_config`` that matches, in the order of the file; ``layer_type_quant_config``; ``global_quant_config``.
Names match as fnmatch patterns, case-sensitive and over the whole name; nothing is merged between levels, so a null
weight is a float weight. Source: amd-quark 0.13, ``torch/export/main_export/quant_config_parser.py`` (how an exported
config is read back) and ``torch/quantization/file2file_quantization.py``; 0.11.1 is the same. Quark does not read
``re:`` entries in ``exclude``; engines do, and so does this reader.
"""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatchcase
from typing import Any

from quarkconv.defects import invalid_quantization
from quarkconv.scheme.declared import DeclaredScheme
from quarkconv.scheme.patterns import TimeLimit, first_match
from quarkconv.scheme.spec import FLOAT, PER_CHANNEL, PER_TOKEN, ModuleScheme, TensorSpec
from quarkconv.text import shortened, word

LINEAR_TYPE = "Linear"
"""The only key of ``layer_type_quant_config`` that concerns the modules of a checkpoint."""
MAX_LAYERS = 100_000
"""Largest number of keys of ``layer_quant_config``: the largest models have as many linears."""
_MAX_STAGES = 4


class QuarkScheme(DeclaredScheme):
    """A ``quantization_config`` with ``quant_method: quark``."""

    def __init__(self, config: dict[str, Any]) -> None:
        version = config.get("version")
        super().__init__("quark", shortened(str(version)) if isinstance(version, str | int | float) else None)
        self.default = self._layer(config.get("global_quant_config"), "global_quant_config")
        by_type = self._object(config.get("layer_type_quant_config"), "layer_type_quant_config")
        if LINEAR_TYPE in by_type:
            self.default = self._layer(by_type[LINEAR_TYPE], f"layer_type_quant_config.{LINEAR_TYPE}")
        limit = TimeLimit()
        by_name = self._object(config.get("layer_quant_config"), "layer_quant_config")
        if len(by_name) > MAX_LAYERS:
            raise invalid_quantization(
                "The quantization config has settings for too many layers",
                expected=f"at most {MAX_LAYERS}",
                found=f"{len(by_name)} in layer_quant_config",
            )
        self._keys = tuple(by_name)
        self._key = first_match(by_name, limit)
        self._layers = [self._layer(value, f"layer_quant_config.{shortened(key)}") for key, value in by_name.items()]
        self._excluded = self._filter(config.get("exclude"), "exclude", limit=limit, globs=True)
        export = self._object(config.get("export"), "export")
        self.stores_codes = export.get("weight_format", "real_quantized") == "real_quantized"
        group = self._strings(export.get("kv_cache_group"), "export.kv_cache_group")
        for key in group:
            layer = by_name.get(key)
            outputs = layer.get("output_tensors") if isinstance(layer, dict) else None
            spec = self._spec(outputs, f"layer_quant_config.{key}.output_tensors", weight=False)
            if spec is not None:
                self.kv_cache, self.kv_cache_modules = spec, tuple(group)

    def excludes(self, module: str) -> bool:
        """Whether ``exclude`` has a module."""
        return bool(self._excluded(module))

    def resolve_as_one(self, experts: str) -> ModuleScheme:
        """The scheme of routed experts by the name of the module that holds them, as vLLM looks it up.

        Keys of ``layer_quant_config`` without ``*`` match there when they contain the name.
        """
        for key, layer in zip(self._keys, self._layers, strict=True):
            if fnmatchcase(experts, key) if "*" in key else experts in key:
                return layer
        return self.default

    def resolve(self, module: str) -> ModuleScheme:
        if self._excluded(module):
            return FLOAT
        position = self._key(module)
        return self.default if position is None else self._layers[position]

    def resolver(self) -> Callable[[str], ModuleScheme]:
        if self._layers:
            return self.resolve
        excluded, default = self._excluded, self.default
        return lambda module: FLOAT if excluded(module) else default

    def _layer(self, value: object, where: str) -> ModuleScheme:
        """Parse one QLayerConfig: the specs of weight and input_tensors."""
        layer = self._object(value, where)
        return ModuleScheme(
            self._spec(layer.get("weight"), f"{where}.weight", weight=True),
            self._spec(layer.get("input_tensors"), f"{where}.input_tensors", weight=False),
        )

    def _spec(self, value: object, where: str, *, weight: bool) -> TensorSpec | None:
        """Parse one QTensorConfig. Quark writes per-token as per_channel and dynamic, on an input."""
        if isinstance(value, list) and len(value) == 1:
            value = value[0]
        if isinstance(value, list) and value:
            dtypes = [word(self._object(stage, where).get("dtype")) for stage in value[:_MAX_STAGES]]
            return TensorSpec("+".join(dtypes), "multi_stage", symmetric=False, dynamic=False)
        if value is None:
            return None
        spec = self._object(value, where)
        dtype, qscheme = spec.get("dtype"), spec.get("qscheme")
        dynamic = spec.get("is_dynamic", spec.get("dynamic", False))
        if not isinstance(dtype, str) or not isinstance(dynamic, bool | None):
            self._problem(where, "dtype a string and is_dynamic a boolean", value)
            return None
        granularity = word(qscheme)
        axis = spec.get("ch_axis", spec.get("axis"))
        if granularity == PER_CHANNEL and not weight and dynamic:
            granularity = PER_TOKEN
        elif granularity == PER_CHANNEL and axis not in (0, -2, None):
            granularity = f"per_channel(axis={word(axis)})"
        return TensorSpec(word(dtype), granularity, symmetric=spec.get("symmetric") is True, dynamic=bool(dynamic))
