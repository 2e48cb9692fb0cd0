"""Whether engines know the names of the experts: their classes of some model types know the published names only."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from quarkconv.experts.config import ModelConfig
from quarkconv.experts.naming import ENGINE_NAMES
from quarkconv.experts.topology import MoELayer, Topology
from quarkconv.findings import Finding, FindingsAbout, finding


def foreign_modules(config: ModelConfig, topology: Topology) -> list[MoELayer]:
    """The layers whose MoE module has another name than in engines' classes of the model type."""
    known = ENGINE_NAMES.get(config.model_type or "")
    return [] if known is None else [layer for layer in topology.layers if layer.moe.rpartition(".")[2] != known[0]]


def foreign_projections(config: ModelConfig, topology: Topology) -> list[MoELayer]:
    """The layers whose projections have other names than in engines' classes of the model type."""
    known = ENGINE_NAMES.get(config.model_type or "")
    return [] if known is None else [layer for layer in topology.layers if layer.naming != known[1]]


_WRAPPERS: Final = ("module.", "_orig_mod.", "_fsdp_wrapped_module.", "base_model.", "model.model.")
"""What wrappers put before every name: data parallelism, torch.compile, FSDP, adapters, a model within a model."""


def wrapped_names(topology: Topology) -> Iterator[Finding]:
    """The finding about names below a wrapper that was saved with the model."""
    layers = [layer.prefix for layer in topology.layers if layer.prefix.startswith(_WRAPPERS)]
    if layers:
        wrapper = next(wrapper for wrapper in _WRAPPERS if layers[0].startswith(wrapper))
        yield from FindingsAbout(
            "wrapped-names",
            layers,
            f"Names begin with {wrapper}, as those of a wrapper around the model do",
            hint="engines know the names without it, and conversion keeps names: save the model without its wrapper",
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
