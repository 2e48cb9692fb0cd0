"""Exports as vLLM needs them: with content, and with what the published models have in config.json."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Final

from engines.expected import fill
from engines.published import publish

PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "minimax_m3_vl": {
        "vision_config": {"img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2}},
        "text_config": {
            "use_routing_bias": True, "scoring_func": "sigmoid", "hidden_act": "swigluoai", "moe_layer_freq": [1],
        },
    },
}  # fmt: skip
"""Beside those that both engines read."""


def prepare(folder: Path) -> Path:
    """Turn the copy of an export into one vLLM distinguishes: with content, and the fields of published models."""
    fill(folder)
    publish(folder, PUBLISHED)
    return folder
