"""Exports as vLLM needs them: with content, and with what the published models have in config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from engines.expected import fill
from engines.published import publish
from support.checkpoints import edit_checkpoint

PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "step3p5": {
        "need_fp32_gate": True, "num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 32,
        "use_head_wise_attn_gate": True, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "layer_types": ["full_attention"] * 3, "yarn_only_types": [], "sliding_window": None,
    },
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
    if json.loads((folder / "config.json").read_text())["model_type"] == "step3p5":
        norms = [f"model.layers.{layer}.self_attn.{norm}_norm.weight" for layer in range(3) for norm in "qk"]
        edit_checkpoint(folder, lambda tensors: tensors.update({name: torch.rand(32).bfloat16() for name in norms}))
    return folder
