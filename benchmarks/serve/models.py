"""Models to serve without their weights: config.json alone, in the sizes that were published, with fewer layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_INT8 = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {"num_bits": 8, "type": "int", "strategy": "channel", "symmetric": True, "dynamic": False},
            "input_activations": {
                "num_bits": 8,
                "type": "int",
                "strategy": "token",
                "symmetric": True,
                "dynamic": True,
            },
        }
    },
    "ignore": ["lm_head", r"re:.*\.gate$"],
}

_COMMON: dict[str, Any] = {
    "bos_token_id": 0, "eos_token_id": 1, "hidden_act": "silu", "head_dim": 128, "max_position_embeddings": 40960,
    "rms_norm_eps": 1e-6, "tie_word_embeddings": False, "torch_dtype": "bfloat16", "attention_dropout": 0.0,
    "quantization_config": _INT8, "rope_theta": 1000000.0,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    "Qwen3-30B-A3B": _COMMON | {
        "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "vocab_size": 151936,
        "hidden_size": 2048, "num_hidden_layers": 48, "num_attention_heads": 32, "num_key_value_heads": 4,
        "intermediate_size": 6144, "moe_intermediate_size": 768, "num_experts": 128, "num_experts_per_tok": 8,
        "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [], "attention_bias": False,
    },
    "MiniMax-M2": _COMMON | {
        "architectures": ["MiniMaxM2ForCausalLM"], "model_type": "minimax_m2", "vocab_size": 200064,
        "hidden_size": 3072, "num_hidden_layers": 62, "num_attention_heads": 48, "num_key_value_heads": 8,
        "intermediate_size": 1536, "num_local_experts": 256, "num_experts_per_tok": 8, "scoring_func": "sigmoid",
        "use_routing_bias": True, "use_qk_norm": True, "qk_norm_type": "per_layer", "rotary_dim": 64,
    },
}  # fmt: skip
"""Name -> config.json, from the published configs; the linears and the experts are int8 per channel and per token."""


def write_model(name: str, layers: int, folder: Path) -> Path:
    """Write the config.json of a model with so many layers; returns its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    config = MODELS[name] | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    return folder
