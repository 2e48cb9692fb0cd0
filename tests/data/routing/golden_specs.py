"""The blocks, engine functions and expert classes whose results are goldens: see make_goldens.py."""

HIDDEN = 16

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
    "bailing_moe_v3": (
        GROUPED_TOPK,
        {"topk": 4, "renormalize": True, "num_expert_group": 4, "topk_group": 2, "scoring_func": "sigmoid",
         "routed_scaling_factor": 2.5}, 16, True,
        {"model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"], "num_experts": 16,
         "num_experts_per_tok": 4, "n_group": 4, "topk_group": 2, "score_function": "sigmoid",
         "scoring_func": "sigmoid", "topk_method": "noaux_tc", "moe_router_enable_expert_bias": True,
         "routed_scaling_factor": 2.5, "router_dtype": "fp32", "seq_aux": True, "hidden_act": "silu"},
    ),
    "kimi_k3": (
        GROUPED_TOPK,
        {"topk": 4, "renormalize": True, "num_expert_group": 2, "topk_group": 1, "scoring_func": "sigmoid",
         "routed_scaling_factor": 2.5}, 16, True,
        {"model_type": "kimi_linear", "num_experts": 16, "num_experts_per_token": 4, "num_expert_group": 2,
         "topk_group": 1, "use_grouped_topk": True, "moe_renormalize": True, "moe_router_activation_func": "sigmoid",
         "routed_scaling_factor": 2.5, "hidden_act": "situ", "activation_situ_beta": 4.0,
         "activation_situ_linear_beta": 25.0, "routed_expert_hidden_size": 8, "latent_moe_use_norm": True},
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
