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
}  # fmt: skip
"""Model type -> fields that the published models have in config.json, vLLM reads, and the fixtures lack."""


def prepare(folder: Path) -> Path:
    """Turn the copy of an export into one vLLM distinguishes: with content, and the fields of published models."""
    fill(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | PUBLISHED.get(config["model_type"], {})))
    if config["model_type"] == "step3p5":
        norms = [f"model.layers.{layer}.self_attn.{norm}_norm.weight" for layer in range(3) for norm in "qk"]
        edit_checkpoint(folder, lambda tensors: tensors.update({name: torch.rand(32).bfloat16() for name in norms}))
    return folder
