"""A small deepseek_v4 in floats, with layers of every kind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn


def every_kind_of_layer(folder: Path) -> Path:
    """Four layers: attention over entries of 2 and of 8 tokens, and over 8 tokens alone; two choose experts by token.

    Attention over entries of 2 tokens chooses 3 of them, so that windows of 24 tokens leave most of them out.
    """
    from transformers import AutoModelForCausalLM, DeepseekV4Config

    torch.manual_seed(3)
    rotary = {"partial_rotary_factor": 0.25, "rope_type": "default"}
    config = DeepseekV4Config(
        vocab_size=48, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=4, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, q_lora_rank=8, o_groups=2, o_lora_rank=8,
        n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, swiglu_limit=10.0,
        layer_types=["compressed_sparse_attention", "heavily_compressed_attention", "compressed_sparse_attention",
                     "sliding_attention"],
        compress_rates={"compressed_sparse_attention": 2, "heavily_compressed_attention": 8},
        mlp_layer_types=["hash_moe", "moe", "moe", "hash_moe"], sliding_window=8, index_n_heads=2, index_head_dim=8,
        index_topk=3, hc_mult=2, max_position_embeddings=64, initializer_range=0.3, pad_token_id=None,
        rope_parameters={"main": {**rotary, "rope_theta": 1e4}, "compress": {**rotary, "rope_theta": 1.6e5}},
    )  # fmt: skip
    model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, 0.5, 1.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("tid2eid"):
            buffer.copy_(torch.stack([torch.randperm(4)[:2] for _ in range(48)]))
    model.save_pretrained(folder)
    stored = json.loads((folder / "config.json").read_text("utf-8"))
    assert stored["mlp_layer_types"].count("hash_moe") == 2
    return folder
