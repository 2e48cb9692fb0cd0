"""Which modules a config must name as not quantized."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Final

from quarkconv.description.description import Description
from quarkconv.experts.naming import NAMINGS
from quarkconv.scheme.merged import MERGED_WITH

_WITHOUT_MLP: Final = (".mlp.fc1", ".mlp.fc2")
"""Linears of image encoders that vLLM's MiniMax-M3 keeps directly in the layer; it looks them up under that name."""
_BY_PATTERN: Final = "language."
"""Prefix of modules that vLLM 0.33's DeepSeek-VL2 looks up by it, while it gives names in the config another one."""
_IN_SGLANG: Final = (
    ("model.language_model.", "model."), ("language_model.model.", "model."), ("model.visual.", "visual."),
)  # fmt: skip
"""Prefix of modules -> the one under which SGLang 0.5.23 looks them up: its w8a8_int8 config maps no names."""
_MERGED_IN_SGLANG: Final = (".attn.qkv", ".attn.qkv_proj")
"""A linear of image encoders, and its name there."""
_LAYER_IN_SGLANG: Final = (re.compile(r"(?:model\.)?(layers\.\d+)\.(attn|ffn)\."), {"attn": "self_attn", "ffn": "mlp"})
"""Modules of DeepSeek V4's layers, whose parts have other names there."""
_BESIDE_MLP: Final = ("bailing_hybrid",)
"""Model types whose class there looks up linears of ``mlp``, shared experts too, by the name of the layer."""


def ignored_modules(description: Description, float_modules: Collection[str]) -> list[str]:
    """Every module that is not quantized, by its exact names in engines, with the linear that they merge it into.

    Args:
        description: the source.
        float_modules: its int8 modules that conversion dequantizes.
    """
    names = set(_ignored(description, float_modules))
    names |= {f"re:{re.escape(module)}$" for module in names if module.startswith(_BY_PATTERN)}
    if description.config.model_type in _BESIDE_MLP:
        names |= {module.replace(".mlp.", ".", 1) for module in names}
    quantized = {module for module, form in description.stored.linears.items() if form.quantized}
    return sorted(names.union(*map(_names_in_sglang, names)) - (quantized - names))


def _names_in_sglang(module: str) -> Iterator[str]:
    stored, name = _MERGED_IN_SGLANG
    for outer, prefix in _IN_SGLANG:
        if module.startswith(outer):
            rest = module.removeprefix(outer)
            yield prefix + (f"{rest.removesuffix(stored)}{name}" if rest.endswith(stored) else rest)
    pattern, parts = _LAYER_IN_SGLANG
    if match := pattern.match(module):
        yield f"model.{match[1]}.{parts[match[2]]}.{module[match.end() :]}"


def _ignored(description: Description, float_modules: Collection[str]) -> Iterator[str]:
    topology = description.topology
    in_float = frozenset(float_modules)
    quantized = {module for module, form in description.stored.linears.items() if not form.is_float} - in_float
    for module in (*float_modules, *description.float_linears):
        yield module
        if module in topology.members:
            continue
        head, _, leaf = module.rpartition(".")
        if module.endswith(_WITHOUT_MLP):
            yield f"{head.removesuffix('.mlp')}.{leaf}"
        parts, merged = MERGED_WITH.get(leaf, ((), ()))
        if not quantized.intersection(f"{head}.{part}" for part in parts):
            yield from (f"{head}.{name}" for name in merged)
    in_fp8 = {module for group in description.fp8 for module in group.modules}
    for layer in topology.layers:
        if not layer.quantized and in_fp8.isdisjoint(layer.module_names):
            yield layer.prefix
            yield from layer.module_names
            for leaf in NAMINGS[0].projections():  # vLLM and SGLang look these up under every naming
                yield f"{layer.prefix}.0.{leaf}"
