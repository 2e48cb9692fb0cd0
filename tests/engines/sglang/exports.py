"""Exports as SGLang needs them: with content, and with what the published models have beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import torch
from engines.expected import fill
from engines.published import PUBLISHED as PUBLISHED_EVERYWHERE
from engines.published import publish
from support.checkpoints import edit_checkpoint

PUBLISHED: Final[dict[str, dict[str, Any]]] = {
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True},
    "deepseek_v3": {
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
        "rope_parameters": {
            "rope_theta": 10000.0, "rope_type": "yarn", "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "deepseek_v2": {"moe_layer_freq": 1, "scoring_func": "softmax"},
    "deepseek": {"pad_token_id": None},
    "glm5_next": {"text_config": {
        **PUBLISHED_EVERYWHERE["glm5_next"]["text_config"], "index_kpool_compress": True,
    }},
    "hunyuan_v1_moe": {
        "moe_intermediate_size": [8], "use_mixed_mlp_moe": True, "num_shared_expert": [1], "use_qk_norm": True,
        "use_cla": False, "attention_head_dim": 8,
    },
    "longcat_flash": {"rope_scaling": {"rope_type": "default", "rope_theta": 10000.0}},
    "minimax_m3_vl": {
        "vision_config": {
            "img_token_compression_config": {"spatial_merge_size": 2, "temporal_patch_size": 2},
            "position_embedding_type": "rope", "rope_mode": "3d", "vision_segment_max_frames": 4,
        },
        "text_config": {
            "use_routing_bias": True, "scoring_func": "sigmoid", "hidden_act": "swigluoai", "moe_layer_freq": [1],
            "qk_norm_type": "per_head", "use_gemma_norm": True,
        },
    },
    "step3p5": {
        **PUBLISHED_EVERYWHERE["step3p5"], "rope_theta": [10000.0] * 3, "partial_rotary_factors": [1.0] * 3,
    },
    "phimoe": {"architectures": ["PhiMoEForCausalLM"], "attention_bias": False, "lm_head_bias": True},
    "nemotron_h": {"layers_block_type": ["attention", "moe"], "layer_types": ["attention", "moe"]},
    "qwen3_5_moe": {
        "text_config": {"full_attention_interval": 2}, "vision_config": {"deepstack_visual_indexes": []},
    },
    "qwen3_5_moe_text": {"full_attention_interval": 1},
    "qwen4_exp": {"text_config": {"full_attention_interval": 1}},
    "qwen3_next": {"full_attention_interval": 1},
}  # fmt: skip
"""Beside those that both engines read."""


_LINEARS: Final[dict[str, tuple[int, ...]]] = {
    "model.visual.patch_embed.proj": (16, 3, 2, 4, 4), "model.visual.blocks.0.attn.qkv": (48, 16),
    "model.visual.blocks.0.attn.proj": (16, 16), "model.visual.blocks.0.mlp.linear_fc1": (16, 16),
    "model.visual.blocks.0.mlp.linear_fc2": (16, 16), "model.visual.merger.linear_fc1": (64, 64),
    "model.visual.merger.linear_fc2": (16, 64), "linear_proj.0": (16, 16), "linear_proj.2": (16, 16),
    **dict.fromkeys(("model.visual.blocks.0.norm1", "model.visual.blocks.0.norm2", "model.visual.merger.norm"), (16,)),
}  # fmt: skip
"""Layers of bailing's image encoder: name -> shape of the weight; each has a bias."""
_NOT_EXPORTED: Final[dict[str, dict[str, tuple[int, ...]]]] = {
    "bailing_moe_v3_vl": {
        **{f"{name}.weight": shape for name, shape in _LINEARS.items()},
        "model.visual.pos_embed.weight": (4, 16),
        **{f"{name}.bias": shape[:1] for name, shape in _LINEARS.items()},
    },
    "minimax_m3_vl": {f"vision_tower.vision_model.post_layernorm.{leaf}": (16,) for leaf in ("weight", "bias")},
    "phimoe": {"lm_head.bias": (24,)},
}
"""Model type -> tensors of the published models, or that SGLang expects, that the exports lack."""
_DBRX: Final = {
    "attn_config": ("clip_qkv", "kv_n_heads", "rope_theta"),
    "ffn_config": ("ffn_hidden_size", "moe_num_experts", "moe_top_k"),
}


def model_type(folder: Path) -> str:
    """The model type of a checkpoint."""
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def prepare(folder: Path) -> Path:
    """Give a copy of an export content, and what the published models have beside it."""
    fill(folder)
    publish(folder, PUBLISHED)
    shapes = _NOT_EXPORTED.get(model_type(folder), {})
    _drop_unpublished(folder / "config.json")
    added = {name: torch.rand(shape).bfloat16() for name, shape in shapes.items()}
    edit_checkpoint(folder, lambda tensors: tensors.update(added))
    return folder


def _drop_unpublished(config: Path) -> None:
    """Remove from the parts of DBRX's config what transformers 5.24 writes there and 5.19 refuses to read."""
    content = json.loads(config.read_text())
    for part, names in _DBRX.items():
        if part in content:
            content[part] = {name: value for name, value in content[part].items() if name in names}
    config.write_text(json.dumps(content))
