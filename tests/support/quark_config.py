"""The ``quantization_config`` that Quark writes: ptpc_int8 unless something else is given."""

from __future__ import annotations

import copy
from typing import Any, Final

Config = dict[str, Any]

WEIGHT: Final[Config] = {
    "dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False, "symmetric": True,
    "group_size": None, "observer_cls": "PerChannelMinMaxObserver",
}  # fmt: skip
"""A QTensorConfig: static, symmetric int8 with a scale for each output channel."""
INPUT: Final[Config] = {**WEIGHT, "ch_axis": 1, "is_dynamic": True}
"""Dynamic int8 with a scale for each token."""
TENSOR_WEIGHT: Final[Config] = {**WEIGHT, "qscheme": "per_tensor", "ch_axis": None}
"""Static int8 with one scale."""
STATIC_INPUT: Final = TENSOR_WEIGHT


def layer_config(weight: object = WEIGHT, inputs: object = INPUT) -> Config:
    """A QLayerConfig: how one layer, or a group of layers, is quantized."""
    return copy.deepcopy(
        {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None, "target_device": None}
    )


def quark_config(**changes: object) -> Config:
    """A quantization_config of Quark 0.13, with some keys replaced."""
    return {
        "quant_method": "quark", "version": "0.13", "global_quant_config": layer_config(), "exclude": [],
        "layer_quant_config": {}, "layer_type_quant_config": {}, "kv_cache_quant_config": {},
        "quant_mode": "eager_mode",
        "export": {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"},
        **copy.deepcopy(changes),
    }  # fmt: skip
