"""Whether vLLM reads a Quark config as Quark does.

Source: ``QuarkConfig`` of vLLM 0.28 to 0.33, ``model_executor/layers/quantization/quark/quark.py``. It expects the
fields of :data:`_FIELDS`, refuses a linear whose scheme has no weight unless ``exclude`` names it, and looks up routed
experts by the name of the module that holds all of them.
"""

from __future__ import annotations

from typing import Any, Final

from quarkconv.description.contradictions import is_linear
from quarkconv.description.description import Description
from quarkconv.scheme.formats.quark import QuarkScheme

_FIELDS: Final[dict[str, type]] = {
    "export": dict, "exclude": list, "layer_quant_config": dict, "layer_type_quant_config": dict,
    "global_quant_config": dict,
}  # fmt: skip
"""Field of the config -> its type, for which vLLM has no default."""


def is_read_otherwise(description: Description) -> bool:
    """Whether vLLM fails on the Quark config of a checkpoint, or takes experts for others; False for other configs."""
    declared, config = description.declared, description.config.quantization
    if not isinstance(declared, QuarkScheme) or not isinstance(config, dict):
        return False
    return _lacks_fields(config) or _has_null_schemes(declared, description) or _mistakes_experts(declared, description)


def _lacks_fields(config: dict[str, Any]) -> bool:
    if any(not isinstance(config.get(field), kind) for field, kind in _FIELDS.items()):
        return True
    return not isinstance(config["export"].get("kv_cache_group"), list)


def _has_null_schemes(declared: QuarkScheme, description: Description) -> bool:
    """Whether linears are in float by a scheme without a weight, and not by ``exclude``."""
    experts = description.topology.members
    return any(
        not declared.excludes(module)
        for (form, claim), modules in description.modules.groups.items()
        if form.is_float and claim.weight is None
        for module in modules
        if (module in experts or is_linear(module, form))
        and not description.is_float(module)
        and not description.is_mtp(module)
    )


def _mistakes_experts(declared: QuarkScheme, description: Description) -> bool:
    """Whether the experts of the first int8 layer have another scheme by the name of the module that holds them."""
    layer = description.int8_layers[0] if description.int8_layers else None
    if layer is None:
        return False
    return declared.resolve_as_one(layer.prefix) != declared.resolve(layer.module_names[0])
