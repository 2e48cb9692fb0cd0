"""Make goldens.safetensors and goldens.json: what each family's own MoE block hands to its experts.

Run beside its output with transformers 5.23.0 and torch 2.13.0:  python make_goldens.py
The block runs whole, with its experts replaced by a recorder, so that all it does between router and experts
counts.
Every tensor is float32 (ids int64) and random from a fixed seed.
"""

import importlib
import json
from pathlib import Path

import torch
import transformers
from safetensors.torch import save_file
from torch import nn

HIDDEN, TOKENS = 16, 12
HERE = Path(__file__).parent

# transformers.logging goes to stderr; this keeps advice about fast kernels out of it.
transformers.logging.set_verbosity_error()


class Recorder(nn.Module):
    """Stands for the experts; keeps the routing that it is called with."""

    def forward(self, hidden_states, topk_ids, topk_weights):
        self.topk_ids, self.topk_weights = topk_ids, topk_weights
        return torch.zeros_like(hidden_states)


# name: (transformers module, config class, MoE block class, config)
SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MIXTRAL_SIZES = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
CASES = {
    "mixtral": (
        "mixtral",
        "MixtralConfig",
        "MixtralSparseMoeBlock",
        {**MIXTRAL_SIZES, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": (
        "qwen2_moe",
        "Qwen2MoeConfig",
        "Qwen2MoeSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": False},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "qwen3_moe-not_renormalised": (
        "qwen3_moe",
        "Qwen3MoeConfig",
        "Qwen3MoeSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
    "qwen3_next": (
        "qwen3_next",
        "Qwen3NextConfig",
        "Qwen3NextSparseMoeBlock",
        {
            **SIZES,
            "num_experts": 16,
            "num_experts_per_tok": 5,
            "norm_topk_prob": True,
            "shared_expert_intermediate_size": 8,
        },
    ),
    "qwen3_5_moe": (
        "qwen3_5_moe",
        "Qwen3_5MoeTextConfig",
        "Qwen3_5MoeSparseMoeBlock",
        {**SIZES, "num_experts": 16, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 8},
    ),
    "deepseek_v2-greedy": (
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2Moe",
        {
            **SIZES,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "topk_method": "greedy",
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.0,
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v2-groups": (
        "deepseek_v2",
        "DeepseekV2Config",
        "DeepseekV2Moe",
        {
            **SIZES,
            "n_routed_experts": 12,
            "num_experts_per_tok": 3,
            "topk_method": "group_limited_greedy",
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": False,
            "routed_scaling_factor": 16.0,
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v3": (
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3MoE",
        {
            **SIZES,
            "n_routed_experts": 16,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.5,
            "n_shared_experts": 1,
        },
    ),
    "deepseek_v3-not_renormalised": (
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3MoE",
        {
            **SIZES,
            "n_routed_experts": 9,
            "num_experts_per_tok": 2,
            "n_group": 3,
            "topk_group": 1,
            "norm_topk_prob": False,
            "routed_scaling_factor": 1.5,
            "n_shared_experts": 1,
        },
    ),
    # Its config.json has its own model_type; transformers loads the language model of Kimi with deepseek_v3's classes.
    "kimi_k2": (
        "deepseek_v3",
        "DeepseekV3Config",
        "DeepseekV3MoE",
        {
            **SIZES,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 1,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 2.827,
            "n_shared_experts": 1,
            "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
    ),
    "glm4_moe": (
        "glm4_moe",
        "Glm4MoeConfig",
        "Glm4MoeMoE",
        {
            **SIZES,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "n_group": 2,
            "topk_group": 1,
            "norm_topk_prob": True,
            "routed_scaling_factor": 1.5,
            "n_shared_experts": 1,
        },
    ),
    "minimax_m2": (
        "minimax_m2",
        "MiniMaxM2Config",
        "MiniMaxM2SparseMoeBlock",
        {**MIXTRAL_SIZES, "num_local_experts": 8, "num_experts_per_tok": 3},
    ),
    # transformers has no step3p5, but step3p7, whose text model is that one; its checkpoint keys are mapped below.
    "step3p5": (
        "step3p7",
        "Step3p7TextConfig",
        "Step3p7SparseMoeBlock",
        {
            **SIZES,
            "n_routed_experts": 8,
            "num_experts_per_tok": 3,
            "moe_router_scaling_factor": 3.0,
            "share_expert_dim": 8,
        },
    ),
}
# What a checkpoint's config.json says where transformers' own class does not write it in that form.
AS_PUBLISHED = {
    "kimi_k2": lambda config: {**config, "model_type": "kimi_k2"},
    "step3p5": lambda config: {
        "model_type": "step3p5",
        "hidden_size": HIDDEN,
        "moe_num_experts": config["n_routed_experts"],
        "moe_top_k": config["num_experts_per_tok"],
        "moe_router_activation": "sigmoid",
        "moe_router_scaling_factor": config["moe_router_scaling_factor"],
        "norm_expert_weight": True,
        "use_moe_router_bias": True,
        "need_fp32_gate": True,
    },
}


def main() -> None:
    tensors, cases = {}, {}
    for number, (name, (module, config_class, block_class, settings)) in enumerate(CASES.items()):
        torch.manual_seed(1000 + number)
        home = f"transformers.models.{module}"
        config = getattr(importlib.import_module(f"{home}.configuration_{module}"), config_class)(**settings)
        block_type = getattr(importlib.import_module(f"{home}.modeling_{module}"), block_class)
        # Step3p7SparseMoeBlock alone asks which layer it is.
        block = (block_type(config, 1) if module == "step3p7" else block_type(config)).float().eval()
        block.experts = Recorder()

        weight = torch.randn(block.gate.weight.shape) * 0.4
        hidden_states = torch.randn(TOKENS, HIDDEN)
        block.gate.weight.data.copy_(weight)
        for shared in (child for key, child in block.named_children() if key.startswith("shared")):
            for parameter in shared.parameters():
                parameter.data.zero_()
        biases = [buffer for key, buffer in block.named_buffers() if key.endswith("e_score_correction_bias")]
        for bias in biases:
            bias.copy_(torch.randn(bias.shape) * 0.3)
            tensors[f"{name}.bias"] = bias.clone()
        with torch.no_grad():
            block(hidden_states.unsqueeze(0))
        topk_weights = block.experts.topk_weights
        if module == "step3p7":
            # That block scales the experts' output instead, which is the same by linearity.
            topk_weights = topk_weights * block.routed_scaling_factor

        tensors |= {
            f"{name}.hidden_states": hidden_states,
            f"{name}.weight": weight,
            f"{name}.topk_weights": topk_weights,
            f"{name}.topk_ids": block.experts.topk_ids,
        }
        written = json.loads(config.to_json_string(use_diff=False))
        written = AS_PUBLISHED.get(name, lambda same: same)(written)
        cases[name] = {"source": f"{home}.modeling_{module}.{block_class}", "experts": len(weight), "config": written}

    versions = {"transformers": transformers.__version__, "torch": torch.__version__}
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / "goldens.safetensors")
    goldens = json.dumps({"versions": versions, "cases": cases}, indent=1, sort_keys=True)
    (HERE / "goldens.json").write_text(goldens + "\n")


if __name__ == "__main__":
    main()
