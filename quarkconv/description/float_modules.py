"""Modules that engines keep in float, in any checkpoint: routers, gates of shared experts, heads, embeddings.

Rows of :mod:`quarkconv.experts.families` name them, and those that one engine alone keeps in float, from the engines'
own model classes. Heads and embeddings are the same in every class: ``ParallelLMHead`` and ``VocabParallelEmbedding``
of vLLM and SGLang are no linears to a quantization method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from typing import Final

from quarkconv.experts.families import FLOAT_ENDS, ONE_ENGINE_ENDS
from quarkconv.experts.family import EngineFloat, FamilyOf
from quarkconv.experts.topology import Topology
from quarkconv.scheme.resolved import Groups

_ENDS: Final = (
    "lm_head", "head", "embed_tokens", "embed", "embedding", "word_embeddings", "tok_embeddings", "wte", "wpe",
)  # fmt: skip
_DOTTED_ENDS: Final = tuple(f".{end}" for end in _ENDS)


def float_test(topology: Topology, family: FamilyOf) -> Callable[[str], bool]:
    """A test of module names: True for modules that engines keep in float.

    Args:
        topology: the MoE layers.
        family: the family of models that a module belongs to; None where it is unknown.
    """
    moe_modules = {layer.router_module for layer in topology.layers}

    def is_float(module: str) -> bool:
        if module in topology.unread:
            return False
        if module.endswith(_DOTTED_ENDS) or module in _ENDS:
            return True
        known = family(module)
        if known is not None:
            return known.in_float(module)
        # Of another family only what stands beside routed experts, where routers and their like do.
        return module.endswith(FLOAT_ENDS) and any(module.removesuffix(end) in moe_modules for end in FLOAT_ENDS)

    return is_float


def engine_test(
    linears: Collection[str], rules_of: Callable[[str], tuple[EngineFloat, ...]], is_mtp: Callable[[str], bool]
) -> Callable[[str], str | None]:
    """A function of the names of linears: the engine that alone keeps a linear in float, None where none does.

    Args:
        linears: all linears of the checkpoint.
        rules_of: of :func:`quarkconv.experts.knowledge.float_in_one_engine`.
        is_mtp: whether a module belongs to a layer of multi-token prediction.
    """

    def engine_of(module: str) -> str | None:
        if not module.endswith(ONE_ENGINE_ENDS):
            return None
        for engine, name, beside, mtp in rules_of(module):
            if (
                module.endswith(f".{name}")
                and (not beside or f"{module.rpartition('.')[0]}.{beside}" in linears)
                and (not mtp or is_mtp(module))
            ):
                return engine
        return None

    return engine_of


def quantized_float_modules_of(others: Groups, engine_of: Callable[[str], str | None]) -> Mapping[str, tuple[str, ...]]:
    """Engine -> the linears outside of the routed experts that are stored in int8, and that it alone keeps in float.

    Args:
        others: the modules outside of the routed experts.
        engine_of: of :func:`engine_test`.
    """
    found: dict[str, list[str]] = {}
    for (form, _), names in others.items():
        for name in names if form.quantized and len(form.weight.shape) == 2 else ():
            engine = engine_of(name)
            if engine is not None:
                found.setdefault(engine, []).append(name)
    return {engine: tuple(names) for engine, names in found.items()}


def quantized_float_modules(
    others: Groups, is_float: Callable[[str], bool], unread: Collection[str]
) -> tuple[str, ...]:
    """Of the modules outside of the routed experts, those that are stored in int8 and that engines keep in float.

    Weights of three or more dimensions are convolutions: Quark's file-to-file mode quantizes them, and engines do not.

    Args:
        others: the modules outside of the routed experts.
        is_float: of :func:`float_test`.
        unread: modules of experts that make no layer.
    """
    return tuple(
        name
        for (form, _), names in others.items()
        if form.quantized
        for name in names
        if (is_float(name) if len(form.weight.shape) == 2 else name not in unread)
    )
