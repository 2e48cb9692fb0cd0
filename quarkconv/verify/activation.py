"""The activation function of a model's experts, from its config."""

from __future__ import annotations

from quarkconv.experts.function import ExpertActivation, Unknown
from quarkconv.experts.knowledge import knowledge

__all__ = ["ExpertActivation", "expert_activation"]


def expert_activation(config: object, layer: int, module: str = "") -> ExpertActivation | Unknown:
    """The activation of the experts of a layer, or what about it is not known.

    Args:
        config: the parsed config.json.
        layer: number of the layer: some models clamp in some layers only.
        module: name of the layer's module, for models of several stacks of layers.
    """
    known = knowledge(config, module)
    return known if isinstance(known, Unknown) else known.activation(layer)
