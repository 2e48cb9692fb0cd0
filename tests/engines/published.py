"""What published models have, engines read, and exports lack: fields of config.json, and tensors."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import torch
from support.checkpoints import edit_checkpoint

Fields = Mapping[str, Mapping[str, Any]]
"""Model type -> fields; those of a part of the model are added to what the export has."""

_V3: Final = {"topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1}
PUBLISHED: Final[Fields] = {
    "deepseek_v32": _V3,
    "glm_moe_dsa": _V3,
    "kimi_k2": _V3,
    "glm5_next": {"text_config": {
        **_V3, "mhc": True, "mla_use_nope": True, "indexer_rope_interleave": True, "num_nextn_predict_layers": 0,
    }},
    "kimi_linear": {
        "mla_use_nope": True, "q_lora_rank": None, "min_moe_intermediate_per_partition": 1,
        "linear_attn_config": {
            "kda_layers": [1], "full_attn_layers": [], "num_heads": 2, "head_dim": 8, "short_conv_kernel_size": 4,
        },
    },
    "mimo_v2_flash": {
        "hybrid_layer_pattern": [0], "moe_layer_freq": [1], "layernorm_epsilon": 1e-5, "scoring_func": "sigmoid",
        "topk_method": "noaux_tc", "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
        "rope_theta": 10000.0, "swa_rope_theta": 10000.0,
    },
    "qwen3_vl_moe": {"text_config": {"norm_topk_prob": True}},
    "step3p5": {
        "need_fp32_gate": True, "num_attention_heads": 4, "num_attention_groups": 2, "head_dim": 32,
        "use_head_wise_attn_gate": True, "max_position_embeddings": 256, "rms_norm_eps": 1e-6, "rope_theta": 10000.0,
        "layer_types": ["full_attention"] * 3, "yarn_only_types": [], "sliding_window": None,
        "swiglu_limits": [0.0] * 3, "swiglu_limits_shared": [0.0] * 3,
    },
}  # fmt: skip
ADDED: Final = {
    "step3p5": {f"model.layers.{layer}.self_attn.{part}_norm.weight": (32,) for layer in range(3) for part in "qk"},
}
"""Model type -> tensors of the published models that exports, or checkpoints made like one, lack."""


def publish(folder: Path, fields: Fields) -> None:
    """Give a checkpoint the fields and tensors of its model type."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in {**PUBLISHED, **fields}.get(config["model_type"], {}).items():
        config[key] = {**config[key], **value} if key.endswith("_config") and key in config else value
    path.write_text(json.dumps(config))
    added = {name: torch.rand(shape).bfloat16() for name, shape in ADDED.get(config["model_type"], {}).items()}
    if added:
        edit_checkpoint(folder, lambda tensors: tensors.update(added))
