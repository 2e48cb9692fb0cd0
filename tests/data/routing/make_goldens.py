"""Make the goldens of this folder: what each family's own code routes to and computes.

    goldens.json, goldens.safetensors    what the MoE block hands to its experts; the block runs whole, with its experts
                                         replaced by a recorder, so that all between router and experts counts
    experts.json, experts.safetensors    what the experts class makes of given tokens, experts and weights

Run beside its output with torch 2.13.0, transformers 5.24.0 and the unpacked sources of vLLM 0.33.0 and SGLang 0.5.23:

    python make_goldens.py /tmp/src/vllm /tmp/src/sglang

The two engines are not imported: the functions named below are taken out of their files and run.
Routing is float32 (ids int64); experts compute in float64 with weights and tokens that bfloat16 holds. All is random
from fixed seeds.
"""

import ast
import importlib
import json
import math
import os
import sys
import tempfile
import types
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: a kernel is run below, without a GPU

import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import save_file
from torch import nn

HIDDEN, TOKENS = 16, 12
HERE = Path(__file__).parent

# transformers.logging goes to stderr; this keeps advice about fast kernels out of it.
transformers.logging.set_verbosity_error()


class Recorder(nn.Module):
    """Stands for the experts; keeps the routing that it is called with."""

    def forward(self, hidden_states, topk_ids=None, topk_weights=None):
        self.hidden_states, self.topk_ids, self.topk_weights = hidden_states, topk_ids, topk_weights
        return torch.zeros_like(hidden_states)


SIZES = {
    "hidden_size": HIDDEN,
    "intermediate_size": 16,
    "moe_intermediate_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
}
MIXTRAL_SIZES = {"hidden_size": HIDDEN, "intermediate_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2}
V3 = {**SIZES, "n_shared_experts": 1, "norm_topk_prob": True}
GROUPS = {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5}


def case(module, config, block, settings, **more):
    """A block of transformers. `more`: `router`, the attribute that routes; `layer`, given to the block; `part`, the
    attribute of the config that the block takes; `published`, what config.json says where transformers writes another
    form; `seed`, where it is not the number of the case."""
    return {"module": module, "config": config, "block": block, "settings": settings, "router": "gate", **more}


ROUTING = {
    "mixtral": case(
        "mixtral", "MixtralConfig", "MixtralSparseMoeBlock",
        {**MIXTRAL_SIZES, "num_local_experts": 8, "num_experts_per_tok": 2},
    ),
    "qwen2_moe": case(
        "qwen2_moe", "Qwen2MoeConfig", "Qwen2MoeSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 4, "norm_topk_prob": False},
    ),
    "qwen3_moe": case(
        "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "qwen3_moe-not_renormalised": case(
        "qwen3_moe", "Qwen3MoeConfig", "Qwen3MoeSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
    "qwen3_next": case(
        "qwen3_next", "Qwen3NextConfig", "Qwen3NextSparseMoeBlock",
        {**SIZES, "num_experts": 16, "num_experts_per_tok": 5, "norm_topk_prob": True,
         "shared_expert_intermediate_size": 8},
    ),
    "qwen3_5_moe": case(
        "qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeSparseMoeBlock",
        {**SIZES, "num_experts": 16, "num_experts_per_tok": 4, "shared_expert_intermediate_size": 8},
    ),
    "deepseek_v2-greedy": case(
        "deepseek_v2", "DeepseekV2Config", "DeepseekV2Moe",
        {**SIZES, "n_routed_experts": 8, "num_experts_per_tok": 3, "topk_method": "greedy", "norm_topk_prob": False,
         "routed_scaling_factor": 1.0, "n_shared_experts": 1},
    ),
    "deepseek_v2-groups": case(
        "deepseek_v2", "DeepseekV2Config", "DeepseekV2Moe",
        {**SIZES, "n_routed_experts": 12, "num_experts_per_tok": 3, "topk_method": "group_limited_greedy", "n_group": 4,
         "topk_group": 2, "norm_topk_prob": False, "routed_scaling_factor": 16.0, "n_shared_experts": 1},
    ),
    "deepseek_v3": case(
        "deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE",
        {**V3, **GROUPS, "n_routed_experts": 16, "num_experts_per_tok": 4},
    ),
    "deepseek_v3-not_renormalised": case(
        "deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE",
        {**V3, "n_routed_experts": 9, "num_experts_per_tok": 2, "n_group": 3, "topk_group": 1, "norm_topk_prob": False,
         "routed_scaling_factor": 1.5},
    ),
    # Its config.json has its own model_type; transformers loads the language model of Kimi with deepseek_v3's classes.
    "kimi_k2": case(
        "deepseek_v3", "DeepseekV3Config", "DeepseekV3MoE",
        {**V3, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 1, "topk_group": 1,
         "routed_scaling_factor": 2.827, "scoring_func": "sigmoid", "topk_method": "noaux_tc"},
        published=lambda config: {**config, "model_type": "kimi_k2"},
    ),
    "glm4_moe": case(
        "glm4_moe", "Glm4MoeConfig", "Glm4MoeMoE",
        {**V3, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
         "routed_scaling_factor": 1.5},
    ),
    "minimax_m2": case(
        "minimax_m2", "MiniMaxM2Config", "MiniMaxM2SparseMoeBlock",
        {**MIXTRAL_SIZES, "num_local_experts": 8, "num_experts_per_tok": 3},
    ),
    # transformers has no step3p5, but step3p7, whose text model is that one; its checkpoint keys are mapped below. That
    # block scales the experts' output, which is the same by linearity.
    "step3p5": case(
        "step3p7", "Step3p7TextConfig", "Step3p7SparseMoeBlock",
        {**SIZES, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_router_scaling_factor": 3.0,
         "share_expert_dim": 8},
        layer=1, output_scale="moe_router_scaling_factor",
        published=lambda config: {
            "model_type": "step3p5", "hidden_size": HIDDEN, "moe_num_experts": config["n_routed_experts"],
            "moe_top_k": config["num_experts_per_tok"], "moe_router_activation": "sigmoid",
            "moe_router_scaling_factor": config["moe_router_scaling_factor"], "norm_expert_weight": True,
            "use_moe_router_bias": True, "need_fp32_gate": True,
        },
    ),
    "deepseek_v32": case(
        "deepseek_v32", "DeepseekV32Config", "DeepseekV32MoE",
        {**V3, **GROUPS, "n_routed_experts": 16, "num_experts_per_tok": 4},
    ),
    "glm4_moe_lite": case(
        "glm4_moe_lite", "Glm4MoeLiteConfig", "Glm4MoeLiteMoE",
        {**V3, **GROUPS, "n_routed_experts": 8, "num_experts_per_tok": 3},
    ),
    "glm_moe_dsa": case(
        "glm_moe_dsa", "GlmMoeDsaConfig", "GlmMoeDsaMoE",
        {**V3, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    ),
    "glm5_next": case(
        "glm5_next", "Glm5NextTextConfig", "Glm5NextTextMoE",
        {**V3, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
         "num_key_value_heads": 2},
    ),
    "mimo_v2": case(
        "mimo_v2_flash", "MiMoV2FlashConfig", "MiMoV2FlashMoE",
        {**SIZES, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_group": 2, "topk_group": 1,
         "norm_topk_prob": True},
        published=lambda config: {
            **config, "model_type": "mimo_v2", "routed_scaling_factor": None, "scoring_func": "sigmoid",
            "topk_method": "noaux_tc",
        },
    ),
    "nemotron_h": case(
        "nemotron_h", "NemotronHConfig", "NemotronHMoE",
        {**V3, **GROUPS, "n_routed_experts": 8, "num_experts_per_tok": 3, "moe_shared_expert_intermediate_size": 8,
         "layers_block_type": ["mamba", "moe"]},
    ),
    "nemotron_h-latent": case(
        "nemotron_h", "NemotronHConfig", "NemotronHMoE",
        {**V3, "n_routed_experts": 8, "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "moe_latent_size": 8,
         "moe_shared_expert_intermediate_size": 8, "layers_block_type": ["mamba", "moe"]},
    ),
    "bailing_hybrid": case(
        "bailing_hybrid", "BailingHybridConfig", "BailingHybridMoE",
        {**SIZES, "num_experts": 16, "num_experts_per_token": 4, "num_expert_group": 4, "topk_group": 2,
         "num_shared_experts": 1, "moe_renormalize": True},
    ),
    "kimi_linear": case(
        "kimi_linear", "KimiLinearConfig", "KimiLinearMoE",
        {**SIZES, "num_experts": 16, "num_experts_per_token": 4, "num_expert_group": 4, "topk_group": 2,
         "num_shared_experts": 1, "moe_renormalize": True},
        published=lambda config: {
            **config, "moe_router_activation_func": "sigmoid", "use_grouped_topk": True, "moe_layer_freq": 1,
        },
    ),
    "minimax_m3": case(
        "minimax_m3_vl", "MiniMaxM3VLTextConfig", "MiniMaxM3VLSparseMoeBlock",
        {**MIXTRAL_SIZES, "num_local_experts": 8, "num_experts_per_tok": 3, "shared_intermediate_size": 8,
         "routed_scaling_factor": 2.0},
        output_scale="routed_scaling_factor",
        published=lambda config: {
            **config, "model_type": "minimax_m3_text", "hidden_act": "swigluoai", "scoring_func": "sigmoid",
            "use_routing_bias": True,
        },
    ),
    "deepseek_v4": case(
        "deepseek_v4", "DeepseekV4Config", "DeepseekV4SparseMoeBlock",
        {**SIZES, "n_routed_experts": 8, "num_experts_per_tok": 3, "n_shared_experts": 1, "num_hash_layers": 1,
         "routed_scaling_factor": 1.5, "num_key_value_heads": 1},
        layer=1,
    ),
    "lfm2_moe": case(
        "lfm2_moe", "Lfm2MoeConfig", "Lfm2MoeSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True, "routed_scaling_factor": 1.5,
         "layer_types": ["conv", "full_attention"]},
    ),
    "llama4": case(
        "llama4", "Llama4TextConfig", "Llama4TextMoe",
        {**MIXTRAL_SIZES, "num_local_experts": 8, "num_experts_per_tok": 2, "intermediate_size_mlp": 16},
        router="router",
    ),
    "qwen4_exp": case(
        "qwen4_exp", "Qwen4ExpTextConfig", "Qwen4ExpTextSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
         "shared_expert_intermediate_size": 8},
    ),
    "qwen3_vl_moe": case(
        "qwen3_vl_moe", "Qwen3VLMoeTextConfig", "Qwen3VLMoeTextSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 3},
    ),
    "qwen3_omni_moe": case(
        "qwen3_omni_moe", "Qwen3OmniMoeTextConfig", "Qwen3OmniMoeThinkerTextSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True},
    ),
    "qwen3_omni_moe_talker": case(
        "qwen3_omni_moe", "Qwen3OmniMoeTalkerTextConfig", "Qwen3OmniMoeTalkerTextSparseMoeBlock",
        {**SIZES, "num_experts": 8, "num_experts_per_tok": 2, "norm_topk_prob": False,
         "shared_expert_intermediate_size": 8},
    ),
    "olmoe": case(
        "olmoe", "OlmoeConfig", "OlmoeSparseMoeBlock",
        {**MIXTRAL_SIZES, "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False},
    ),
    "jamba": case(
        "jamba", "JambaConfig", "JambaSparseMoeBlock",
        {**MIXTRAL_SIZES, "num_experts": 8, "num_experts_per_tok": 2}, router="router",
    ),
    "granitemoehybrid": case(
        "granitemoehybrid", "GraniteMoeHybridConfig", "GraniteMoeHybridMoE",
        {**MIXTRAL_SIZES, "num_local_experts": 8, "num_experts_per_tok": 3, "mamba_n_heads": 4}, router="router",
    ),
    "aria": case(
        "aria", "AriaTextConfig", "AriaTextMoELayer",
        {**MIXTRAL_SIZES, "moe_num_experts": 8, "moe_topk": 3, "moe_num_shared_experts": 1}, router="router",
    ),
    "gpt_oss": case(
        "gpt_oss", "GptOssConfig", "GptOssMLP",
        {**MIXTRAL_SIZES, "num_local_experts": 8, "num_experts_per_tok": 3}, router="router",
    ),
    "phimoe": case(
        "phimoe", "PhimoeConfig", "PhimoeSparseMoeBlock",
        {**MIXTRAL_SIZES, "num_local_experts": 8, "num_experts_per_tok": 2, "router_jitter_noise": 0.1},
        router="router",
    ),
    "dbrx": case(
        "dbrx", "DbrxConfig", "DbrxFFN",
        {"d_model": HIDDEN, "n_heads": 2, "n_layers": 2,
         "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 8, "moe_num_experts": 8, "moe_top_k": 3}},
        router="router.layer",
    ),
    "dbrx-2_norm": case(
        "dbrx", "DbrxConfig", "DbrxFFN",
        {"d_model": HIDDEN, "n_heads": 2, "n_layers": 2,
         "ffn_config": {"hidden_size": HIDDEN, "ffn_hidden_size": 8, "moe_num_experts": 8, "moe_top_k": 3,
                        "moe_normalize_expert_weights": 2.0}},
        router="router.layer",
    ),
    "gemma4": case(
        "gemma4", "Gemma4TextConfig", "Gemma4TextRouter",
        {**SIZES, "num_experts": 8, "top_k_experts": 3, "enable_moe_block": True}, router="proj",
    ),
    "ernie4_5_moe": case(
        "ernie4_5_moe", "Ernie4_5_MoeConfig", "Ernie4_5_MoeSparseMoeBlock",
        {**SIZES, "moe_num_experts": 8, "moe_k": 3, "moe_num_shared_experts": 1},
    ),
    "hunyuan_v1_moe": case(
        "hunyuan_v1_moe", "HunYuanMoEV1Config", "HunYuanMoEV1Moe",
        {**MIXTRAL_SIZES, "num_experts": 8, "moe_topk": 3}, router="gate.wg",
    ),
    "longcat_flash": case(
        "longcat_flash", "LongcatFlashConfig", "LongcatFlashMoE",
        {"hidden_size": HIDDEN, "ffn_hidden_size": 16, "expert_ffn_hidden_size": 8, "num_layers": 2,
         "num_attention_heads": 2, "n_routed_experts": 8, "zero_expert_num": 4, "moe_topk": 3,
         "routed_scaling_factor": 6.0},
        router="router.classifier",
    ),
}  # fmt: skip

GROUPED_TOPK = ("vllm", "vllm/model_executor/layers/fused_moe/router/grouped_topk_router.py", "grouped_topk")
# name: (source, its arguments besides logits and bias, experts, with a bias, config.json)
ENGINES = {
    "deepseek": (
        GROUPED_TOPK,
        {"topk": 3, "renormalize": False, "num_expert_group": 1, "topk_group": 1, "scoring_func": "softmax"}, 8, False,
        {"model_type": "deepseek", "n_routed_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": False,
         "scoring_func": "softmax", "hidden_act": "silu"},
    ),
    "deepseek_v2-noaux_tc": (
        GROUPED_TOPK,
        {"topk": 3, "renormalize": True, "num_expert_group": 2, "topk_group": 1, "scoring_func": "sigmoid",
         "routed_scaling_factor": 2.0}, 8, True,
        {"model_type": "deepseek_v2", "n_routed_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
         "scoring_func": "sigmoid", "topk_method": "noaux_tc", "n_group": 2, "topk_group": 1,
         "routed_scaling_factor": 2.0, "hidden_act": "silu"},
    ),
    "bailing_moe": (
        GROUPED_TOPK,
        {"topk": 3, "renormalize": True, "num_expert_group": 1, "topk_group": 1, "scoring_func": "softmax"}, 8, False,
        {"model_type": "bailing_moe", "num_experts": 8, "num_experts_per_tok": 3, "norm_topk_prob": True,
         "hidden_act": "silu", "use_bias": False},
    ),
    "bailing_moe_v2": (
        GROUPED_TOPK,
        {"topk": 4, "renormalize": True, "num_expert_group": 4, "topk_group": 2, "scoring_func": "sigmoid",
         "routed_scaling_factor": 2.5}, 16, True,
        {"model_type": "bailing_moe", "num_experts": 16, "num_experts_per_tok": 4, "norm_topk_prob": True,
         "n_group": 4, "topk_group": 2, "score_function": "sigmoid", "moe_router_enable_expert_bias": True,
         "routed_scaling_factor": 2.5, "hidden_act": "silu", "use_bias": False},
    ),
    "grok-2": (
        ("sglang", "sglang/kernels/ops/moe/router.py", "fused_moe_router_cudacore_kernel"), {"topk": 2}, 8, False,
        {"model_type": "git", "architectures": ["Grok1ForCausalLM"], "num_local_experts": 8, "num_experts_per_tok": 2,
         "router_logit_softcapping": 30.0},
    ),
}  # fmt: skip

EXPERTS = {
    "mixtral": ("MixtralExperts", "silu"), "gemma4": ("Gemma4TextExperts", "gelu_tanh"),
    "glm5_next": ("Glm5NextTextExperts", "clamped"), "deepseek_v4": ("DeepseekV4Experts", "clamped"),
    "minimax_m3": ("MiniMaxM3VLExperts", "swigluoai"), "gpt_oss": ("GptOssExperts", "swigluoai, biases"),
    "nemotron_h": ("NemotronHExperts", "relu2"), "step3p5": ("Step3p7Experts", "swiglustep"),
    "llama4": ("Llama4TextExperts", "weights on the input"), "aria": ("AriaExperts", "transposed"),
    "dbrx": ("DbrxExperts", "rows of all experts in one matrix"),
}  # fmt: skip


def taken_out(path, name, scope):
    """A function or class of a file, without its decorators, run in a scope of its own."""
    tree = ast.parse(Path(path).read_text())
    node = next(node for node in tree.body if getattr(node, "name", None) == name)
    node.decorator_list = []
    module = ast.Module([ast.parse("from __future__ import annotations").body[0], node], [])
    exec(compile(module, str(path), "exec"), scope)
    return scope[name]


def boring_keys():
    """What every config of transformers says."""
    return set(json.loads(transformers.PreTrainedConfig().to_json_string(use_diff=False)))


def built(spec, seed):
    """(config, block in float32, config.json) of a case."""
    torch.manual_seed(seed)
    home = f"transformers.models.{spec['module']}"
    config = getattr(importlib.import_module(f"{home}.configuration_{spec['module']}"), spec["config"])
    config = config(**spec["settings"])
    block_type = getattr(importlib.import_module(f"{home}.modeling_{spec['module']}"), spec["block"])
    block = block_type(*([config] if "layer" not in spec else [config, spec["layer"]])).float().eval()
    written = json.loads(config.to_json_string(use_diff=False))
    keep = {"model_type", "architectures"}
    dull = boring_keys()
    written = {key: value for key, value in written.items() if key in keep or key not in dull}
    written = {key: value for key, value in written.items() if value is not None}
    return config, block, spec.get("published", lambda same: same)(written)


def route_block(name, spec, seed):
    """Tensors and config.json of a case of transformers."""
    config, block, written = built(spec, seed)
    router = block.get_submodule(spec["router"])
    block.experts = Recorder()
    weight = torch.randn(router.weight.shape) * 0.4
    hidden_states = torch.randn(TOKENS, HIDDEN)
    tensors = {"hidden_states": hidden_states, "weight": weight}
    router.weight.data.copy_(weight)
    for key, child in block.named_children():
        if key.startswith("shared"):
            for parameter in child.parameters():
                parameter.data.zero_()
    own = [*block.named_buffers(), *block.named_parameters()]
    for key, bias in own:
        if key.endswith(("e_score_correction_bias", "expert_bias")):
            bias.data.copy_(torch.randn(bias.shape) * 0.3)
            tensors["bias"] = bias.clone()
    if name == "longcat_flash":  # scores of 12 experts are near 1 / 12
        tensors["bias"] *= 0.2
        router_bias = dict(own)["router.e_score_correction_bias"]
        router_bias.data.copy_(tensors["bias"])
    if name == "gpt_oss":
        router.bias.data.copy_(torch.randn(router.bias.shape))
        tensors["logit_bias"] = router.bias.detach().clone()
    if name == "gemma4":
        block.scale.data.copy_(1 + 0.3 * torch.randn(HIDDEN))
        block.per_expert_scale.data.copy_(1 + 0.3 * torch.randn(len(weight)))
        tensors |= {"input_scale": block.scale.detach().clone(), "expert_scale": block.per_expert_scale.detach().clone()}
        router.weight.data.copy_(weight := weight * 10)  # the input is divided by sqrt(H)
        tensors["weight"] = weight
    with torch.no_grad():
        if name == "gemma4":
            _, topk_weights, topk_ids = block(hidden_states)
        else:
            block(hidden_states.unsqueeze(0))
            topk_weights, topk_ids = block.experts.topk_weights, block.experts.topk_ids
    if name == "llama4":  # the experts get every token, times its weight, which is 0 for those that are not chosen
        scores = block.router(hidden_states)[0].detach()
        inputs = block.experts.hidden_states.view(len(weight), TOKENS, HIDDEN)
        assert torch.equal(inputs, scores.T.unsqueeze(-1) * hidden_states)
        topk_weights, topk_ids = scores.topk(config.num_experts_per_tok, dim=-1)
    if "output_scale" in spec:  # that block scales the experts' output, which is the same by linearity
        topk_weights = topk_weights * spec["settings"][spec["output_scale"]]
    tensors |= {"topk_weights": topk_weights, "topk_ids": topk_ids.long()}
    source = f"transformers, {spec['module']}, {spec['block']}"
    return tensors, {"source": source, "experts": len(weight) - written.get("zero_expert_num", 0), "config": written}


def route_engine(name, seed, roots):
    """Tensors and config.json of a case whose routing only an engine has."""
    (engine, file, function), settings, experts, biased, config = ENGINES[name]
    torch.manual_seed(seed)
    weight, hidden_states = torch.randn(experts, HIDDEN) * 0.4, torch.randn(TOKENS, HIDDEN)
    if name == "grok-2":
        weight *= 8  # logits near the cap
    tensors = {"hidden_states": hidden_states, "weight": weight}
    if biased:
        tensors["bias"] = torch.randn(experts) * 0.3
    if name == "grok-2":
        topk_weights, topk_ids = softcapped(Path(roots[engine]) / file, hidden_states, weight, settings["topk"])
    else:
        scope = {"torch": torch, "envs": types.SimpleNamespace(
            VLLM_USE_FUSED_MOE_GROUPED_TOPK=False, VLLM_BATCH_INVARIANT=False)}  # fmt: skip
        run = taken_out(Path(roots[engine]) / file, function, scope)
        logits = F.linear(hidden_states, weight)
        topk_weights, topk_ids = run(hidden_states, logits, e_score_correction_bias=tensors.get("bias"), **settings)
    tensors |= {"topk_weights": topk_weights, "topk_ids": topk_ids.long()}
    return tensors, {"source": f"{engine}, {file}, {function}", "experts": experts, "config": config}


def softcapped(file, hidden_states, weight, topk):
    """SGLang's Triton kernel for Grok, by Triton's interpreter."""
    with tempfile.TemporaryDirectory() as folder:  # an interpreted kernel is read from its file
        text = file.read_text().replace("from sglang.srt.utils import is_hip\n", "is_hip = lambda: False\n")
        Path(folder, "grok_router.py").write_text(text)
        sys.path.insert(0, folder)
        module = importlib.import_module("grok_router")
        return module.fused_moe_router_cudacore(hidden_states, weight, topk, 30.0)


def compute_experts(name, seed):
    """Tensors and config.json of an experts class, in float64."""
    spec = ROUTING[name]
    config, _, written = built(spec, seed)
    home = importlib.import_module(f"transformers.models.{spec['module']}.modeling_{spec['module']}")
    more = {"swiglu_limit": 0.5} if name == "step3p5" else {}
    if name in ("glm5_next", "deepseek_v4", "minimax_m3", "gpt_oss"):
        config.swiglu_limit = written["swiglu_limit"] = 0.75  # tokens below reach it
    config._experts_implementation = "eager"
    experts = getattr(home, EXPERTS[name][0])(config.ffn_config if name == "dbrx" else config, **more).double().eval()
    tensors = {}
    for key, parameter in experts.named_parameters():
        values = (torch.randn(parameter.shape) * 0.4).bfloat16()
        parameter.data.copy_(values)
        tensors[key] = values
    count = written.get("ffn_config", written).get("moe_num_experts") or ROUTED[name]["experts"]
    hidden_states = torch.randn(TOKENS, HIDDEN).bfloat16()
    ids = torch.stack([torch.randperm(count)[:2] for _ in range(TOKENS)])
    weights = torch.rand(TOKENS, 2) + 0.25
    with torch.no_grad():
        if name == "llama4":
            scores = torch.zeros(TOKENS, count).scatter(-1, ids, weights).double()
            inputs = (scores.T.unsqueeze(-1) * hidden_states.double()).reshape(-1, HIDDEN)
            output = experts(inputs).view(count, TOKENS, HIDDEN).sum(dim=0)
        else:
            output = experts(hidden_states.double(), ids, weights.double())
    if name == "step3p5":
        written["swiglu_limits"] = [0.5, 0.5]
    tensors |= {"hidden_states": hidden_states, "topk_ids": ids, "topk_weights": weights, "output": output.reshape(TOKENS, HIDDEN)}
    return tensors, {"source": f"transformers, {spec['module']}, {EXPERTS[name][0]}", "what": EXPERTS[name][1],
                     "experts": count, "config": written}  # fmt: skip


def compute_situ(roots):
    """vLLM's SituAndMul, with and without the clip of up."""
    torch.manual_seed(77)
    scope = {"torch": torch, "CustomOp": object}
    situ = taken_out(Path(roots["vllm"]) / "vllm/model_executor/layers/activation.py", "SituAndMul", scope)
    gate_up = (torch.randn(TOKENS, 2 * HIDDEN) * 2).bfloat16().float()
    tensors = {"gate_up": gate_up}
    for key, beta, linear in (("plain", 1.5, None), ("clipped", 1.5, 0.75)):
        one = situ.__new__(situ)
        one.beta, one.linear_beta = beta, linear
        tensors[key] = one.forward_native(gate_up)
    return tensors


def write(stem, tensors, cases):
    versions = {"transformers": transformers.__version__, "torch": torch.__version__, "vllm": "0.33.0", "sglang": "0.5.23"}
    save_file({key: value.contiguous() for key, value in tensors.items()}, HERE / f"{stem}.safetensors")
    goldens = json.dumps({"versions": versions, "cases": cases}, sort_keys=True, separators=(",", ":"))
    # A line for each case, to be read in a diff.
    goldens = goldens.replace('{"config":', '\n{"config":')
    (HERE / f"{stem}.json").write_text(goldens + "\n")


ROUTED = {}


def main() -> None:
    roots = {"vllm": sys.argv[1], "sglang": sys.argv[2]}
    tensors = {}
    for number, (name, spec) in enumerate(ROUTING.items()):
        found, ROUTED[name] = route_block(name, spec, 1000 + number)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    for number, name in enumerate(ENGINES):
        found, ROUTED[name] = route_engine(name, 2000 + number, roots)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    write("goldens", tensors, ROUTED)
    tensors, cases = {}, {}
    for number, name in enumerate(EXPERTS):
        found, cases[name] = compute_experts(name, 3000 + number)
        tensors |= {f"{name}.{key}": value for key, value in found.items()}
    tensors |= {f"situ.{key}": value for key, value in compute_situ(roots).items()}
    write("experts", tensors, cases)
    assert all(math.isfinite(value.double().sum()) for value in tensors.values())


if __name__ == "__main__":
    main()
