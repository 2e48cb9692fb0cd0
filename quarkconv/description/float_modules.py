"""Linears that engines keep in float, in any checkpoint: routers, gates of shared experts, heads.

Which ones they are, a row of :mod:`quarkconv.experts.families` says, from the engines' own model classes. Heads are the
same in every class: ``ParallelLMHead`` of vLLM and SGLang is not a linear to a quantization method.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from quarkconv.experts.families import FLOAT_ENDS
from quarkconv.experts.family import Family
from quarkconv.experts.topology import Topology
from quarkconv.scheme.resolved import Groups

FamilyOf = Callable[[str], Family | None]

_HEADS: Final = ("lm_head", "shared_head.head")


def float_test(topology: Topology, family: FamilyOf) -> Callable[[str], bool]:
    """A test of module names: True for linears that engines keep in float.

    Args:
        topology: the MoE layers.
        family: the family of models that a module belongs to; None where it is unknown.
    """
    moe_modules = {layer.moe for layer in topology.layers}

    def is_float(module: str) -> bool:
        if module in _HEADS or module.endswith(tuple(f".{head}" for head in _HEADS)):
            return True
        known = family(module)
        if known is not None:
            return known.in_float(module)
        # Of another family only what stands beside routed experts, where routers and their like do.
        return module.endswith(FLOAT_ENDS) and any(module.removesuffix(end) in moe_modules for end in FLOAT_ENDS)

    return is_float


def quantized_float_modules(others: Groups, is_float: Callable[[str], bool]) -> tuple[str, ...]:
    """Of the modules outside of the routed experts, those that are stored in int8 and that engines keep in float."""
    return tuple(
        name
        for (form, _), names in others.items()
        if form.quantized and len(form.weight.shape) == 2
        for name in names
        if is_float(name)
    )
