"""Exports as vLLM needs them: with content, and with what the published models have in config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from engines.expected import fill
from support.checkpoints import edit_checkpoint

PUBLISHED: dict[str, dict[str, Any]] = {
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True},
    "deepseek_v3": {"topk_method": "noaux_tc"},
    "step3p5": {
        "need_fp32_gate": True, "num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 32,
        "use_head_wise_attn_gate": True, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "layer_types": ["full_attention"] * 3, "yarn_only_types": [], "sliding_window": None,
    },
    "deepseek_v32": {"topk_method": "noaux_tc"},
    "glm_moe_dsa": {"topk_method": "noaux_tc"},
    "glm5_next": {"text_config": {
        "mhc": True, "mla_use_nope": True, "indexer_rope_interleave": True, "topk_method": "noaux_tc",
        "scoring_func": "sigmoid", "num_nextn_predict_layers": 0,
    }},
    "kimi_linear": {
        "mla_use_nope": True, "q_lora_rank": None,
        "linear_attn_config": {
            "kda_layers": [1], "full_attn_layers": [], "num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 4,
        },
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0], "moe_layer_freq": [1], "layernorm_epsilon": 1e-5, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
    },
    "minimax_m3_vl": {
        "vision_config": {"img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2}},
        "text_config": {
            "use_routing_bias": True, "scoring_func": "sigmoid", "hidden_act": "swigluoai", "moe_layer_freq": [1],
        },
    },
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
}  # fmt: skip
"""Model type -> fields that the published models have in config.json, vLLM reads, and the fixtures lack."""


def prepare(folder: Path) -> Path:
    """Turn the copy of an export into one vLLM distinguishes: with content, and the fields of published models."""
    fill(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in PUBLISHED.get(config["model_type"], {}).items():
        config[key] = {**config[key], **value} if isinstance(config.get(key), dict) else value
    path.write_text(json.dumps(config))
    if config["model_type"] == "step3p5":
        norms = [f"model.layers.{layer}.self_attn.{norm}_norm.weight" for layer in range(3) for norm in "qk"]
        edit_checkpoint(folder, lambda tensors: tensors.update({name: torch.rand(32).bfloat16() for name in norms}))
    return folder
