"""A small Step-3.5 in floats: the text part of a Step-3.7, under the names that Step-3.5-Flash is published with."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn


def text_and_images(folder: Path) -> Path:
    """A Step-3.7 with a dense layer and three of 4 experts; one clamps gate and up, another its shared expert."""
    from transformers import AutoModelForImageTextToText, Step3p7Config

    torch.manual_seed(3)
    text = {
        "vocab_size": 48, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 4,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "moe_num_experts": 4, "moe_top_k": 2,
        "moe_intermediate_size": 16, "share_expert_dim": 16, "moe_layers_enum": "1,2,3", "sliding_window": 8,
        "moe_router_scaling_factor": 3.0, "pad_token_id": 1, "max_position_embeddings": 64, "rope_theta": [1e4] * 4,
        "layer_types": ["full_attention", "sliding_attention"] * 2, "swiglu_limits": [0, 0, 0.5, 0],
        "swiglu_limits_shared": [0, 0, 0, 0.5], "attention_other_setting": {"num_attention_heads": 4},
    }  # fmt: skip
    vision = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
              "image_size": 16, "patch_size": 8}  # fmt: skip
    auto: Any = AutoModelForImageTextToText
    model = auto.from_config(Step3p7Config(text_config=text, vision_config=vision), dtype=torch.bfloat16)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            nn.init.uniform_(parameter, -0.5, 0.5)
        else:
            nn.init.normal_(parameter, std=0.3)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            nn.init.normal_(buffer, std=0.1)
    model.save_pretrained(folder)
    return folder


def text_alone(whole: Path, folder: Path) -> Path:
    """Its decoder and head as a checkpoint, with a config.json as published."""
    folder.mkdir()
    tensors = load_file(whole / "model.safetensors")
    kept = {name: tensor for name, tensor in tensors.items() if name.startswith(("model.", "lm_head."))}
    save_file(kept, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((whole / "config.json").read_text("utf-8"))["text_config"]
    config |= {
        "model_type": "step3p5", "architectures": ["Step3p5ForCausalLM"], "dtype": "bfloat16",
        "moe_router_activation": "sigmoid", "use_moe_router_bias": True, "norm_expert_weight": True,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    return folder
