"""Whether engines know the names of the experts: their classes of some model types know the published names only."""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from typing import Final

from quarkconv.experts.config import ModelConfig
from quarkconv.experts.layer import MoELayer
from quarkconv.experts.naming import ENGINE_NAMES, published_names, published_roots
from quarkconv.experts.topology import Topology
from quarkconv.findings import IDENTITIES, Finding, FindingsAbout, finding
from quarkconv.scheme.form import linear_names
from quarkconv.scheme.resolved import Groups
from quarkconv.text import plural


def foreign_modules(config: ModelConfig, topology: Topology) -> list[MoELayer]:
    """The layers whose MoE module has another name than in engines' classes of the model type."""
    known = ENGINE_NAMES.get(config.model_type or "")
    return [] if known is None else [layer for layer in topology.layers if layer.moe.rpartition(".")[2] != known[0]]


def foreign_projections(config: ModelConfig, topology: Topology) -> list[MoELayer]:
    """The layers whose projections have other names than in engines' classes of the model type."""
    known = ENGINE_NAMES.get(config.model_type or "")
    return [] if known is None else [layer for layer in topology.layers if layer.naming != known[1]]


def has_published_names(model_type: str, layers: Iterable[MoELayer]) -> bool:
    """Whether experts have the names of published checkpoints of a model type, gate and up in projections of their own.

    Engines' classes know few others: vLLM's drop unknown ones, or fail.
    """
    module, naming = published_names(model_type)
    return all(
        layer.naming == naming and not layer.joined and (layer.moe.rpartition(".")[2] == module or not module)
        for layer in layers
    )


def in_published_stack(model_type: str, layer: MoELayer) -> bool:
    """Whether the names of a layer begin as those of published checkpoints do: ``model.layers.3.mlp``."""
    decoder_layer = layer.moe.rpartition(".")[0] if published_names(model_type)[0] else layer.moe
    stack, _, number = decoder_layer.rpartition(".")
    root = stack[: stack.rfind(".") + 1]
    return number.isdecimal() and root in published_roots(model_type)


def identity_tensors(layers: Iterable[MoELayer], names: Container[str]) -> list[str]:
    """The tensors of experts that return their input, which conversion leaves out.

    Args:
        layers: the MoE layers.
        names: all tensors.
    """
    modules = (module for layer in layers for module in layer.identity_modules)
    return [name for module in modules for name in linear_names(module) if name in names]


def identity_experts(layers: Iterable[MoELayer]) -> Iterator[Finding]:
    """The finding about experts that return their input and have weights all the same."""
    names = [name for layer in layers for name in layer.identity_modules]
    yield from FindingsAbout(
        IDENTITIES,
        names,
        f"{plural(len(names), 'module')} of experts that return their input, as transformers saves them",
        hint="convert it: conversion leaves them out; vLLM has no place for them and fails",
    )


_WRAPPERS: Final = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.", "model.model.")
"""What wrappers put before every name: data parallelism, torch.compile, FSDP, adapters, a model within a model."""


_ADAPTERS: Final = (".lora_A", ".lora_B", ".lora_embedding_A", ".lora_embedding_B", ".lora_magnitude_vector")
"""Parts of the names of adapters that PEFT stores inside a model, beside ``<module>.base_layer``."""


def is_of_adapter(module: str) -> bool:
    """Whether a module is a matrix of a low-rank adapter inside the model."""
    return ".lora_" in module and any(part in module for part in _ADAPTERS)


def wrapped_names(topology: Topology, others: Groups) -> Iterator[Finding]:
    """The findings about names below a wrapper, and about adapters, that were saved with the model.

    Args:
        topology: the MoE layers.
        others: the modules that are not routed experts.
    """
    layers = [layer.prefix for layer in topology.layers if layer.prefix.startswith(_WRAPPERS)]
    if layers:
        wrapper = next(wrapper for wrapper in _WRAPPERS if layers[0].startswith(wrapper))
        yield from FindingsAbout(
            "wrapped-names",
            layers,
            f"Names begin with {wrapper}, the prefix of a wrapper around the model",
            hint="engines know the names without it, and conversion keeps names: save the model without the wrapper",
        )
    adapters = [name for (form, _), names in others.items() if form.is_float for name in filter(is_of_adapter, names)]
    yield from FindingsAbout(
        "wrapped-names",
        adapters,
        f"{plural(len(adapters), 'matrix', 'matrices')} of adapters inside the model: they change its outputs",
        hint="engines know neither adapters nor .base_layer names: merge the adapter, then quantize the merged model",
    )


def expert_name_findings(config: ModelConfig, topology: Topology) -> Iterator[Finding]:
    """The findings about names that engines do not know."""
    modules, projections = foreign_modules(config, topology), foreign_projections(config, topology)
    layers = modules or projections
    if not layers:
        return
    module, naming = ENGINE_NAMES[config.model_type or ""]
    layer = layers[0]
    yield finding(
        "expert-names",
        layer.prefix,
        f"Experts are named {layer.prefix}.N.{layer.naming.gate}; engines' classes for {config.model_type} name them "
        f"{module}.experts.N.{naming.gate}",
        hint="vLLM refuses them; export the model file to file, which keeps the published names"
        if modules
        else "vLLM loads them one by one from 0.29 on; convert to fused-int8, which uses the names that engines know",
        count=len(layers),
    )
