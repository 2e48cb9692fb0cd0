"""What a model's config says about its experts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from quarkconv.experts.ranks import WHOLE, Rank, rank_of_config

TEXT_PARTS: Final = ("text_config", "llm_config", "language_config")
_EXPERTS: Final = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K: Final = ("num_experts_per_tok", "num_experts_per_token", "moe_top_k", "moe_topk", "top_k_experts")
_ACTIVATION: Final = ("hidden_act", "hidden_activation", "moe_hidden_act")


@dataclass(frozen=True, slots=True)
class ConfigGeometry:
    """The claims of a config about the experts; None for what it does not say.

    Attributes:
        model_type: the config's ``model_type``.
        experts: routed experts per layer.
        top_k: experts per token.
        hidden_layers: decoder layers, without those of multi-token prediction.
        activation: name of the activation function of the experts.
        rank: the rank whose part of the experts the checkpoint holds.
    """

    model_type: str | None
    experts: int | None
    top_k: int | None
    hidden_layers: int | None
    activation: str | None
    rank: Rank = WHOLE

    @property
    def local_experts(self) -> int | None:
        """Routed experts per layer that the checkpoint itself holds."""
        return None if self.experts is None else len(self.rank.experts(self.experts))


def text_config(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a config that describes the language model: of a multimodal model a nested object."""
    for key in TEXT_PARTS:
        part = config.get(key)
        if isinstance(part, dict):
            return part
    return config


def config_geometry(config: Mapping[str, Any]) -> ConfigGeometry:
    """Read the claims of a config.json; values of the wrong type count as not said."""
    text = text_config(config)
    model_type = text.get("model_type", config.get("model_type"))
    activation = next((text[key] for key in _ACTIVATION if isinstance(text.get(key), str)), None)
    return ConfigGeometry(
        model_type if isinstance(model_type, str) else None,
        _first_count(text, _EXPERTS),
        _first_count(text, _TOP_K),
        _first_count(text, ("num_hidden_layers",)),
        activation,
        rank_of_config(config),
    )


def _first_count(config: Mapping[str, Any], keys: tuple[str, ...]) -> int | None:
    for key in keys:
        value = config.get(key)
        if type(value) is int and value > 0:
            return value
    return None
