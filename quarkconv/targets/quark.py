"""``quark``: an AMD Quark 0.13 export again, for its tools and the engines that read them.

    P.N.gate_proj.weight         I8   [I, H]
    P.N.gate_proj.weight_scale   F32  [I]      per tensor, F32 [], where activation scales are static
    P.N.gate_proj.input_scale    F32  []       static activation scales only

The scheme is ``ptpc_int8``; a scale per tensor is repeated over the rows. With static activation scales it is
``int8_static``, the only form that Quark has for them; then the rows of a weight must share one scale.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from math import prod
from typing import Any, Final

from quarkconv.description.description import Description
from quarkconv.dtypes import DTYPE_BITS
from quarkconv.plan.experts import Int8Module
from quarkconv.plan.pieces import Check, Copy, OutputTensor, Rows, Scale, f32_rows
from quarkconv.scheme.companions import is_cache_scale, name_in_quark
from quarkconv.scheme.declared import DeclaredScheme
from quarkconv.scheme.form import linear_names
from quarkconv.scheme.spec import FP8_STATIC
from quarkconv.targets.ignored import ignored_modules
from quarkconv.targets.per_expert import PerExpertTarget
from quarkconv.targets.settings import KV_CACHE

QUARK_VERSION: Final = "0.13"
"""The version of Quark whose format is written."""

_F32: Final = 4


class Quark(PerExpertTarget):
    """The target ``quark``."""

    name = "quark"
    summary = "back to a Quark export; loads in vLLM 0.28 and later"

    def module_tensors(self, module: Int8Module) -> Iterator[OutputTensor]:
        names = linear_names(module.name)
        *lead, rows, _ = module.shape
        yield OutputTensor(names.weight, "I8", module.shape, module.codes)
        if not module.input_scales:
            yield OutputTensor(names.scale, "F32", (*lead, rows), module.scales)
            return
        yield OutputTensor(names.scale, "F32", tuple(lead), tuple(map(_one, module.scales)))
        yield OutputTensor(names.input_scale, "F32", module.input_shape, module.input_scales)

    def module_bytes(self, shape: tuple[int, ...], static: int) -> int:
        scales = prod(shape[:-2]) if static else prod(shape[:-1])
        return prod(shape) + _F32 * scales + _F32 * static

    def module_checks(self, module: Int8Module) -> Iterator[Check]:
        if module.input_scales:
            for scale in module.scales:
                if scale.source != _one(scale).source:
                    yield Check("repeats", scale.source, _one(scale).source)

    def config(self, description: Description) -> dict[str, Any]:
        source = description.config.quantization
        declared = description.declared
        carried = source if isinstance(source, dict) and declared is not None and declared.method == "quark" else {}
        export = carried.get("export")
        layer = _layer_config(description.static)
        kv_layers = _kv_cache_layers(declared, layer)
        output_layers = {key: {**layer, "output_tensors": outputs} for key, outputs in _outputs(description).items()}
        quantization = {
            "algo_config": None,
            "kv_cache_post_rope": False,
            "softmax_quant_spec": None,
            **carried,
            "quant_method": "quark",
            "quant_mode": "eager_mode",
            "version": QUARK_VERSION,
            "global_quant_config": layer,
            "layer_type_quant_config": {},
            "layer_quant_config": {**output_layers, **kv_layers},
            "kv_cache_quant_config": kv_layers,
            "exclude": ignored_modules(description, self.float_modules(description)),
            "export": {
                "min_kv_scale": 0.0,
                **(export if isinstance(export, dict) else {}),
                "kv_cache_group": list(kv_layers),
                "pack_method": "reorder",
                "weight_format": "real_quantized",
                "weight_merge_groups": None,
            },
        }
        return description.config.with_quantization(quantization)

    def renamed(self, name: str) -> str:
        return name_in_quark(name)

    def keeps_output_scale(self, description: Description) -> Callable[[str], bool]:
        declared = description.declared
        if declared is not None and declared.method == "quark":
            return lambda _: True
        return is_cache_scale if _kv_cache_layers(declared, {}) else lambda _: False

    def kept_settings(self, description: Description) -> Collection[str]:
        declared = description.declared
        kept = {KV_CACHE} if _kv_cache_layers(declared, {}) else set()
        source = description.config.quantization
        if declared is not None and declared.method == "quark" and isinstance(source, dict):
            kept.update(source, ("export",))  # carried over, unlike the settings of single layers
            kept -= {"global_quant_config", "layer_quant_config", "layer_type_quant_config"}
            kept |= {f"layer_quant_config.{key}.output_tensors" for key in _outputs(description)}
        return kept


def _one(scale: Scale) -> Scale:
    """The first element of a scale, as F32."""
    match scale:
        case Copy():
            return scale._replace(nbytes=_F32)
        case Rows(source, widen, _):
            dtype = widen or "F32"
            return f32_rows(source._replace(nbytes=DTYPE_BITS[dtype] // 8), dtype)


def _outputs(description: Description) -> dict[str, Any]:
    """Pattern -> ``output_tensors`` of the ``layer_quant_config`` of a Quark source."""
    declared, source = description.declared, description.config.quantization
    layers = source.get("layer_quant_config") if isinstance(source, dict) else None
    if declared is None or declared.method != "quark" or not isinstance(layers, dict):
        return {}
    return {
        key: layer["output_tensors"]
        for key, layer in layers.items()
        if isinstance(layer, dict) and layer.get("output_tensors")
    }


def _kv_cache_layers(declared: DeclaredScheme | None, layer: dict[str, Any]) -> dict[str, Any]:
    """``layer_quant_config`` of the linears whose outputs go into a quantized key-value cache."""
    if declared is None or declared.kv_cache != FP8_STATIC:
        return {}
    outputs = _tensor_config("fp8_e4m3", static=True)
    return {pattern: {**layer, "output_tensors": outputs} for pattern in declared.kv_cache_modules}


def _layer_config(static: bool) -> dict[str, Any]:
    """``global_quant_config``: of ptpc_int8, or of int8_static."""
    if static:
        weight = inputs = _tensor_config("int8", static=True)
    else:
        weight = _tensor_config("int8", static=False, axis=0)
        inputs = {**_tensor_config("int8", static=False, axis=1), "is_dynamic": True}
    return {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None, "target_device": None}


def _tensor_config(dtype: str, *, static: bool, axis: int | None = None) -> dict[str, Any]:
    """A QTensorConfig of Quark: per tensor where it is ``static``, else per channel along ``axis``."""
    return {
        "dtype": dtype,
        "is_dynamic": False,
        "qscheme": "per_tensor" if static else "per_channel",
        "ch_axis": axis,
        "group_size": None,
        "block_size": None,
        "symmetric": True,
        "round_method": "half_even",
        "scale_type": "float",
        "scale_format": None,
        "scale_calculation_mode": None,
        "mx_element_dtype": None,
        "observer_cls": "PerTensorMinMaxObserver" if static else "PerChannelMinMaxObserver",
        "is_scale_quant": False,
    }
