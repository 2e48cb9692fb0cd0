"""Fields that published models have in config.json, engines read, and the exports lack, which transformers wrote."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

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
}  # fmt: skip


def publish(folder: Path, fields: Fields) -> None:
    """Give a checkpoint the fields of its model type."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    for key, value in {**PUBLISHED, **fields}.get(config["model_type"], {}).items():
        config[key] = {**config[key], **value} if key.endswith("_config") and key in config else value
    path.write_text(json.dumps(config))
