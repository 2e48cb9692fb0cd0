"""Modules that engines keep in float, in any checkpoint: routers, gates of shared experts, heads, embeddings.

Which ones they are, a row of :mod:`quarkconv.experts.families` says, from the engines' own model classes. Heads and
embeddings are the same in every class: ``ParallelLMHead`` and ``VocabParallelEmbedding`` of vLLM and SGLang are no
linears to a quantization method.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Final

from quarkconv.experts.families import FLOAT_ENDS
from quarkconv.experts.family import FamilyOf
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
