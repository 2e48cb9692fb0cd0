"""A small glm_moe_dsa in floats, whose layers hand on a choice of positions."""

from __future__ import annotations

import json
from pathlib import Path

import torch


def shared_positions(folder: Path) -> Path:
    """Four layers: two choose 4 of 24 positions, and the layer after each takes the same."""
    from transformers import AutoModelForCausalLM, GlmMoeDsaConfig

    torch.manual_seed(3)
    config = GlmMoeDsaConfig(
        vocab_size=48, hidden_size=32, intermediate_size=16, moe_intermediate_size=16, num_hidden_layers=4,
        num_attention_heads=2, num_key_value_heads=2, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2,
        n_group=2, topk_group=1, kv_lora_rank=8, q_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=8,
        index_head_dim=8, index_n_heads=2, index_topk=4, first_k_dense_replace=0, mlp_layer_types=["sparse"] * 4,
        indexer_types=["full", "shared", "full", "shared"], max_position_embeddings=64, initializer_range=0.3,
        pad_token_id=None,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text("utf-8"))
    stored.pop("head_dim", None)  # as published
    (folder / "config.json").write_text(json.dumps(stored), "utf-8")
    return folder
