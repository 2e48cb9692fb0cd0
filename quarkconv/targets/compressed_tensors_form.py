"""The base of targets in the compressed-tensors form: their config.json, and what it can express.

The fields are those of compressed-tensors' ``QuantizationConfig``; vLLM 0.28 and later raise on unknown keys inside
``weights`` and ``input_activations``, so nothing is added.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, Final

from quarkconv.description.description import Description
from quarkconv.description.fp8 import BLOCK_SIZE, Fp8Group
from quarkconv.experts.naming import NAMINGS
from quarkconv.scheme.companions import CACHE_SCALES, is_cache_scale, name_in_engines
from quarkconv.scheme.spec import FP8_STATIC
from quarkconv.targets.base import Target
from quarkconv.targets.ignored import ignored_modules
from quarkconv.targets.settings import KV_CACHE

_KV_CACHE_FP8: Final = {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True, "dynamic": False}
_FORMATS: Final = {"int": "int-quantized", "float": "float-quantized"}
"""Type of the codes -> the format of a group, as compressed-tensors names it (``CompressionFormat``)."""
_CARRIED: Final = ("version", "kv_cache_scheme", "transform_config")
"""Fields of a source in the same form that go over as they are."""


class CompressedTensorsForm(Target):
    """A target whose config.json has a quantization_config of compressed-tensors."""

    transforms = True
    keeps_fp8 = True

    def config(self, description: Description) -> dict[str, Any]:
        groups = [_group(["Linear"], "int", "channel", static=description.static)]
        for fp8 in description.fp8:
            groups.append(_group(_engines_names(description, fp8), "float", fp8.strategy, static=fp8.static))
        if description.fp8:
            groups = [{**group, "format": _FORMATS[group["weights"]["type"]]} for group in groups]
        quantization = {
            "quant_method": "compressed-tensors",
            "format": "mixed-precision" if description.fp8 else _FORMATS["int"],
            "quantization_status": "compressed",
            "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
            "ignore": ignored_modules(description, self.float_modules(description)),
        }
        return description.config.with_quantization(quantization | _carried(description))

    def renamed(self, name: str) -> str:
        return name_in_engines(name)

    def keeps_output_scale(self, description: Description) -> Callable[[str], bool]:
        return is_cache_scale if "kv_cache_scheme" in _carried(description) else lambda _: False

    def kept_settings(self, description: Description) -> Collection[str]:
        carried = _carried(description)
        return {*carried, KV_CACHE} if "kv_cache_scheme" in carried else set(carried)


def _engines_names(description: Description, fp8: Fp8Group) -> list[str]:
    """The modules of a group, with the names of the first expert by which engines look up a layer under any naming."""
    names = set(fp8.modules)
    layers = [layer for layer in description.moe_layers if any(name in names for name in layer.module_names)]
    looked_up = [f"{layer.prefix}.0.{leaf}" for layer in layers for leaf in NAMINGS[0].projections()]
    return [*fp8.modules, *(name for name in looked_up if name not in names)]


def _group(targets: list[str], kind: str, strategy: str, *, static: bool) -> dict[str, Any]:
    """A group of 8-bit modules; engines look up the names of ``targets`` before the class ``Linear``."""
    blocks = {"block_structure": [BLOCK_SIZE, BLOCK_SIZE]} if strategy == "block" else {}
    of_inputs = {"strategy": "group", "group_size": BLOCK_SIZE} if blocks else {}
    return {
        "targets": targets,
        "weights": {
            "num_bits": 8,
            "type": kind,
            "strategy": strategy,
            "symmetric": True,
            "dynamic": False,
            **blocks,
        },
        "input_activations": {
            "num_bits": 8,
            "type": kind,
            "strategy": "tensor" if static else "token",
            "symmetric": True,
            "dynamic": not static,
            **of_inputs,
        },
    }


def _carried(description: Description) -> dict[str, Any]:
    """The settings beside weights and activations."""
    declared = description.declared
    if declared is None:
        return {}
    if declared.method == "compressed-tensors":
        source = description.config.quantization
        fields = (key for key in _CARRIED if key != "kv_cache_scheme" or declared.runs_cache)
        return {key: source[key] for key in fields if isinstance(source, dict) and source.get(key) is not None}
    # engines have names for scales of keys and of values; that of a latent (kv_b_proj) they refuse
    named = all(pattern.endswith(tuple(CACHE_SCALES)) for pattern in declared.kv_cache_modules)
    return {"kv_cache_scheme": dict(_KV_CACHE_FP8)} if declared.kv_cache == FP8_STATIC and named else {}
