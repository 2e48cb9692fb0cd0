"""The table of families: which models route and compute their experts how. Adding a family is adding a row.

A model type without a row is unknown, and nothing is claimed about it. Sources are classes of transformers 5.24.0
(`models/<type>/modeling_<type>.py`) unless a row says otherwise; vLLM is 0.33.0, SGLang 0.5.23. Where two
implementations disagree about a setting, `fixed` refuses it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from quarkconv.experts.family import ActivationName, ActivationRule, EngineFloat, Family, RouterRule, RouterTensors

_BIASED_GATE: Final = RouterTensors(correction_bias=("gate.e_score_correction_bias",))
_ROUTER: Final = RouterTensors(weight=("router.weight",))

_SOFTMAX: Final = RouterRule("softmax", renormalize=("norm_topk_prob",))
_SOFTMAX_OF_ALL: Final = RouterRule("softmax", renormalize=True)
_SOFTMAX_OF_CHOSEN: Final = RouterRule("softmax", renormalize=False, by_logits=True)
_V3: Final = RouterRule(
    "sigmoid", renormalize=("norm_topk_prob",), epsilon=1e-20, scale=("routed_scaling_factor",), group_score="top2"
)
# Keys of the first, remote code; configs that transformers 5 writes lack them.
_V3_FIXED: Final = {"scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc")}
_KIMI_LINEAR: Final = RouterRule(
    "sigmoid", renormalize=("moe_renormalize", "norm_topk_prob"), epsilon=1e-20, scale=("routed_scaling_factor",),
    top_k=("num_experts_per_token", "num_experts_per_tok"), group_score="top2",
    n_group=("num_expert_group", "n_group"),
)  # fmt: skip
_CLAMPED_SILU: Final = ActivationRule(limit=("swiglu_limit",))
_SWIGLU_OAI: Final[Mapping[str, ActivationName]] = {"silu": "swigluoai", "swigluoai": "swigluoai"}
_HYPER_CONNECTIONS: Final = ("hc_scale", "hc_attn_scale", "hc_ffn_scale", "hc_head_scale")
_MTP: Final = ("eh_proj",)  # nn.Linear in vLLM's *_mtp.py
_INDEXER: Final = ("indexer.wk", "indexer.weights_proj")
"""Linears of sparse attention that vLLM merges in float (``wk_weights_proj`` of deepseek_v2.py and glm5next)."""

_SOFTMAX_FAMILIES: Final = (
    Family(("mixtral",), _SOFTMAX_OF_ALL, "MixtralTopKRouter"),
    Family(("qwen2_moe",), _SOFTMAX, "Qwen2MoeTopKRouter", float_modules=("shared_expert_gate",)),
    Family(("qwen3_moe",), _SOFTMAX, "Qwen3MoeTopKRouter"),
    Family(("qwen3_next",), _SOFTMAX, "Qwen3NextTopKRouter", float_modules=("shared_expert_gate",)),
    Family(
        ("qwen4_exp",), _SOFTMAX, "Qwen4ExpTextTopKRouter",
        float_modules=("shared_expert_gate", "input_mix_weight_down", "input_mix_weight_up", "block_inject_weight"),
    ),
    Family(
        ("qwen3_omni_moe",), _SOFTMAX, "Qwen3OmniMoeThinkerTextTopKRouter", classes=("Qwen3OmniMoeThinker",),
    ),
    Family(
        ("qwen3_omni_moe_talker",), _SOFTMAX, "Qwen3OmniMoeTalkerTextTopKRouter", float_modules=("shared_expert_gate",)
    ),
    # These routers always divide; vLLM reads norm_topk_prob, so false there is ambiguous.
    Family(
        ("qwen3_5_moe",), _SOFTMAX_OF_ALL, "Qwen3_5MoeTopKRouter", fixed={"norm_topk_prob": (None, True)},
        float_modules=("shared_expert_gate",),
    ),
    Family(
        ("qwen3_vl_moe",), _SOFTMAX_OF_ALL, "Qwen3VLMoeTextTopKRouter", fixed={"norm_topk_prob": (None, True)},
    ),
    # vLLM's OlmoeMoE never divides, OlmoeTopKRouter obeys the key. Both agree on false.
    Family(
        ("olmoe",), RouterRule("softmax", renormalize=False), "OlmoeTopKRouter",
        fixed={"norm_topk_prob": (None, False)},
    ),
    # vLLM's MambaMixer takes no quantization method; MambaMixer2, of other families, does.
    Family(
        ("jamba",), RouterRule("softmax", renormalize=False), "JambaTopKRouter", tensors=_ROUTER,
        float_modules=("mamba.in_proj", "mamba.x_proj", "mamba.dt_proj", "mamba.out_proj"),
    ),
    # The remote code of deepseek-moe-16b (MoEGate), which vLLM's deepseek_v2.py also runs.
    Family(
        ("deepseek",), RouterRule("softmax", renormalize=("norm_topk_prob",), epsilon=1e-20),
        "vLLM, deepseek_v2.py, DeepseekV2MoE",
        fixed={"scoring_func": (None, "softmax"), "topk_method": (None, "greedy")},
    ),
    # DeepseekV2TopkRouter ignores norm_topk_prob, other implementations divide where it is true. All agree on false.
    Family(
        ("deepseek_v2",),
        RouterRule(
            "softmax", renormalize=False, scale=("routed_scaling_factor",), group_score="max",
            grouped_when=("topk_method", "group_limited_greedy"),
        ),
        "DeepseekV2TopkRouter",
        fixed={
            "norm_topk_prob": (None, False), "scoring_func": (None, "softmax"),
            "topk_method": ("greedy", "group_limited_greedy"),
        },
    ),
    # The largest DeepSeek-VL2: the V2 architecture with the routing of V3.
    Family(
        ("deepseek_v2",), _V3, "vLLM, deepseek_v2.py, DeepseekV2MoE", tensors=_BIASED_GATE,
        fixed={"scoring_func": ("sigmoid",), "topk_method": ("noaux_tc",)},
    ),
    Family(
        ("granitemoe", "granitemoehybrid", "granitemoeshared"), _SOFTMAX_OF_CHOSEN, "GraniteMoeHybridTopKRouter",
        tensors=RouterTensors(weight=("router.layer.weight", "router.weight")),
    ),
    # AriaExperts: the routed experts are SiLU whatever hidden_act says, which is for the shared ones.
    Family(
        ("aria",),
        RouterRule("softmax", renormalize=False, by_logits=True, top_k=("moe_topk",)),
        "AriaTextTopKRouter", tensors=_ROUTER,
    ),
    Family(
        ("gpt_oss",), _SOFTMAX_OF_CHOSEN, "GptOssTopKRouter, GptOssExperts",
        tensors=RouterTensors(weight=("router.weight",), logit_bias=("router.bias",)),
        activation=ActivationRule(
            names=_SWIGLU_OAI, default="swigluoai", limit=("swiglu_limit",), default_limit=7.0,
            alpha=("swiglu_alpha",), default_alpha=1.702,
        ),
        biased=True, interleaved=True,
    ),
    # Divided by the norm that the config names; vLLM divides by the sum, which is the norm of the published model.
    Family(
        ("dbrx",),
        RouterRule(
            "softmax", renormalize=True, top_k=("moe_top_k",), norm_order=("moe_normalize_expert_weights",),
        ),
        "DbrxFFN", tensors=RouterTensors(weight=("router.layer.weight",)),
        activation=ActivationRule(keys=("ffn_act_fn",)), part="ffn_config",
    ),
    Family(
        ("phimoe",), RouterRule("sparsemixer", renormalize=False, jitter=("router_jitter_noise",)), "sparsemixer",
        tensors=RouterTensors(weight=("gate.weight", "router.weight")),
    ),
    Family(
        ("gemma4",),
        RouterRule("softmax", renormalize=True, top_k=("top_k_experts",), normalized_input=True),
        "Gemma4TextRouter",
        tensors=RouterTensors(
            weight=("router.proj.weight",), input_scale=("router.scale",), expert_scale=("router.per_expert_scale",)
        ),
        activation=ActivationRule(keys=("hidden_activation",), names={"gelu_pytorch_tanh": "gelu_tanh"}, default=None),
        own_scales=("per_expert_scale",),
    ),
    # Text and images each have a router and experts of their own, as transformers saves the VL model (text_moe,
    # vision_moe). Divided by no less than moe_norm_min; vLLM divides by the sum itself, which is at least 1 / E.
    Family(
        ("ernie4_5_moe", "ernie4_5_vl_moe"),
        RouterRule(
            "softmax", renormalize=True, top_k=("moe_k", "num_experts_per_tok"), floor=("moe_norm_min",),
        ),
        "Ernie4_5_MoeTopKRouter, Ernie4_5_VLMoeMoeTopKRouter",
        tensors=RouterTensors(
            correction_bias=("moe_statics.e_score_correction_bias", "gate.moe_statics.e_score_correction_bias")
        ),
        fixed={"moe_use_aux_free": (None, True), "moe_gate_act": (None, "softmax"), "use_bias": (None, False)},
    ),
    # SGLang divides where k is more than one, HunYuanMoEV1Gate always; k may be a list with an entry for each layer.
    Family(
        ("hunyuan_v1_moe",),
        RouterRule("softmax", renormalize=True, top_k=("moe_topk",), experts=("num_experts",), per_layer=True),
        "HunYuanMoEV1Gate", tensors=RouterTensors(weight=("gate.wg.weight",)), classes=("HunYuanMoEV1",),
        fixed={"norm_topk_prob": (None, True), "moe_drop_tokens": (None, False)},
    ),
    Family(
        ("longcat_flash",),
        RouterRule(
            "softmax", renormalize=False, top_k=("moe_topk", "num_experts_per_tok"), scale=("routed_scaling_factor",),
            zero_experts=("zero_expert_num",),
        ),
        "LongcatFlashTopkRouter",
        tensors=RouterTensors(
            weight=("router.classifier.weight",), correction_bias=("router.e_score_correction_bias",)
        ),
        fixed={
            "norm_topk_prob": (None, False), "router_bias": (None, False), "zero_expert_type": (None, "identity"),
        },
    ),
    Family(
        ("bailing_moe", "bailing_moe_v2"),
        RouterRule(
            "softmax", renormalize=("norm_topk_prob",), epsilon=1e-20, scale=("routed_scaling_factor",),
            default_scale=1.0,
        ),
        "vLLM, bailing_moe.py, BailingMoE",
        fixed={
            "score_function": (None, "softmax"), "moe_router_enable_expert_bias": (None, False), "n_group": (None, 1),
            "topk_group": (None, 1), "use_bias": (None, False),
        },
    ),
    # The port of grok-1 to torch (modeling_grok1.py, MoeBlock, MoeMLP), whose names Quark's template has. As xai's own
    # code (model.py, Router) it caps the logits of attention, and not those of the router. The engines' class is for
    # other names, and caps both at 30: tanh keeps the order, so the same experts are chosen, with other weights.
    Family(
        ("grok-1",), RouterRule("softmax", renormalize=False), "modeling_grok1.py, MoeBlock, MoeMLP",
        activation=ActivationRule(names={"gelu": "gelu"}, default="gelu"),
    ),
    # xai-org/grok-2 has the model type of another model.
    Family(
        ("git", "grok-2"), RouterRule("softmax", renormalize=False, softcap=30.0), "SGLang, grok.py, Grok1MoE",
        activation=ActivationRule(names={"gelu": "gelu"}, default="gelu"), architectures=("Grok1ForCausalLM",),
        fixed={"router_logit_softcapping": (None, 30, 30.0)},
    ),
)  # fmt: skip

_SIGMOID_FAMILIES: Final = (
    Family(("deepseek_v3",), _V3, "DeepseekV3TopkRouter", tensors=_BIASED_GATE, fixed=_V3_FIXED, float_modules=_MTP),
    Family(
        ("deepseek_v32",), _V3, "DeepseekV32TopkRouter", tensors=_BIASED_GATE, fixed=_V3_FIXED,
        float_modules=(*_MTP, *_INDEXER),
    ),
    # The architecture of deepseek_v3 under its own type: transformers loads it as that.
    Family(
        ("kimi_k2",), _V3, "DeepseekV3TopkRouter", tensors=_BIASED_GATE, classes=("DeepseekV3",), fixed=_V3_FIXED,
        float_modules=_MTP,
    ),
    Family(("glm4_moe",), _V3, "Glm4MoeTopkRouter", tensors=_BIASED_GATE, fixed=_V3_FIXED, float_modules=_MTP),
    Family(
        ("glm4_moe_lite",), _V3, "Glm4MoeLiteTopkRouter", tensors=_BIASED_GATE, fixed=_V3_FIXED, float_modules=_MTP
    ),
    Family(
        ("glm_moe_dsa",), _V3, "GlmMoeDsaTopkRouter", tensors=_BIASED_GATE, fixed=_V3_FIXED,
        float_modules=(*_MTP, *_INDEXER),
    ),
    Family(
        ("glm5_next",), _V3, "Glm5NextTextTopkRouter, Glm5NextTextExperts", tensors=_BIASED_GATE, fixed=_V3_FIXED,
        activation=_CLAMPED_SILU, float_modules=(*_MTP, *_INDEXER), own_scales=_HYPER_CONNECTIONS,
    ),
    # vLLM's mimo_v2.py knows no scale. Its MiMoV2Attention keeps o_proj in float where it is of the MTP layers.
    Family(
        ("mimo_v2", "mimo_v2_flash"),
        RouterRule("sigmoid", renormalize=("norm_topk_prob",), epsilon=1e-20, group_score="top2"),
        "MiMoV2FlashTopkRouter", tensors=_BIASED_GATE, classes=("MiMoV2Omni",),
        fixed={**_V3_FIXED, "routed_scaling_factor": (None, 1, 1.0)},
        float_modules=_MTP, float_in_one_engine=(EngineFloat("vllm", "self_attn.o_proj", mtp=True),),
    ),
    Family(
        ("nemotron_h",), _V3, "NemotronHTopkRouter, NemotronHExperts", tensors=_BIASED_GATE, fixed=_V3_FIXED,
        activation=ActivationRule(keys=("mlp_hidden_act",), names={"relu2": "relu2"}, default=None),
        gated=False, latent=("moe_latent_size",), ignored=("mamba_hidden_act",),
    ),
    Family(
        ("bailing_moe", "bailing_moe_v2", "bailing_moe_linear", "bailing_moe_v2_5"), _V3,
        "vLLM, bailing_moe.py, BailingMoE", tensors=RouterTensors(correction_bias=("gate.expert_bias",)),
        classes=("BailingMoeLinearV2",),
        fixed={
            "score_function": ("sigmoid",), "moe_router_enable_expert_bias": (True,), "use_bias": (None, False),
        },
        float_modules=_MTP,
    ),
    # The third generation has the model type of another. Routed experts clamp gate and up before SiLU, as the shared
    # ones do not. SGLang keeps in float the gate of DsV3MLA (bailing_moe_v3.py), and of KimiDeltaAttention with
    # no_kda_lora (kimi_linear.py), which has f_proj, the beta.
    Family(
        ("bailing_hybrid", "bailing_moe_v3"),
        RouterRule(
            "sigmoid", renormalize=True, scale=("routed_scaling_factor",), default_scale=1.0, group_score="top2",
        ),
        "vLLM, bailing_moe_v3.py, BailingMoeV3MoE", tensors=RouterTensors(correction_bias=("gate.expert_bias",)),
        activation=ActivationRule(limit_list=("expert_swiglu_limit_list",), limited="silu"),
        architectures=("BailingMoeV3ForCausalLM", "BailingMoeV3VLForConditionalGeneration"),
        fixed={
            "score_function": (None, "sigmoid"), "scoring_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc"),
            "moe_router_enable_expert_bias": (None, True), "norm_topk_prob": (None, True),
        },
        ignored=("share_expert_swiglu_limit_list",), float_modules=_MTP,
        float_in_one_engine=(
            EngineFloat("sglang", "attention.g_proj", "kv_b_proj"), EngineFloat("sglang", "attention.b_proj", "f_proj"),
        ),
    ),
    Family(
        ("bailing_hybrid",), _KIMI_LINEAR, "BailingHybridTopkRouter", classes=("BailingMoeV2_5",),
        tensors=RouterTensors(correction_bias=("gate.expert_bias", "gate.e_score_correction_bias")),
        fixed={"score_function": (None, "sigmoid"), "moe_router_enable_expert_bias": (None, True)},
        float_modules=_MTP,
    ),
    # Kimi-Linear and the language model of Kimi-K3, whose experts are narrower than the model (KimiMoE of vLLM's
    # models/kimi_k3) and gated by beta tanh(gate / beta) sigmoid(gate).
    Family(
        ("kimi_linear",), _KIMI_LINEAR, "KimiLinearTopkRouter; vLLM, SituAndMul", tensors=_BIASED_GATE,
        classes=("KimiK3Linear",),
        activation=ActivationRule(
            names={"silu": "silu", "situ": "situ"}, beta=("activation_situ_beta",), default_beta=1.0,
            linear_beta=("activation_situ_linear_beta",),
        ),
        fixed={
            "moe_router_activation_func": (None, "sigmoid"), "topk_method": (None, "noaux_tc"),
            "use_grouped_topk": (None, True),
        },
        latent=("routed_expert_hidden_size",), ignored=("latent_moe_use_norm",),
        float_modules=(*_MTP, "self_attention_res_proj", "mlp_res_proj", "output_attn_res_proj"),
    ),
    # MiniMaxM2TopKRouter always adds the bias; vLLM's minimax_m2.py obeys both keys.
    Family(
        ("minimax_m2",), RouterRule("sigmoid", renormalize=True), "MiniMaxM2TopKRouter",
        tensors=RouterTensors(correction_bias=("e_score_correction_bias",)),
        fixed={"scoring_func": (None, "sigmoid"), "use_routing_bias": (None, True)},
    ),
    Family(
        ("minimax_m3", "minimax_m3_vl"),
        RouterRule("sigmoid", renormalize=True, scale=("routed_scaling_factor",)),
        "MiniMaxM3VLTopKRouter, MiniMaxM3VLExperts", classes=("MiniMaxM3Sparse",),
        tensors=RouterTensors(correction_bias=("e_score_correction_bias", "gate.e_score_correction_bias")),
        activation=ActivationRule(
            names=_SWIGLU_OAI, default="swigluoai", limit=("swiglu_limit",), default_limit=7.0,
            alpha=("swiglu_alpha",), default_alpha=1.702,
        ),
        fixed={
            "scoring_func": (None, "sigmoid"), "use_routing_bias": (None, True), "swiglu_beta": (None, 1, 1.0),
        },
    ),
    # Llama4Router: the k largest logits; Llama4TextMoe multiplies the experts' inputs.
    Family(
        ("llama4",), RouterRule("sigmoid", renormalize=False, by_logits=True, on_input=True), "Llama4TextMoe",
        tensors=_ROUTER,
    ),
    Family(
        ("lfm2_moe",),
        RouterRule(
            "sigmoid", renormalize=("norm_topk_prob",), epsilon=1e-6, scale=("routed_scaling_factor",),
            default_scale=1.0,
        ),
        "Lfm2MoeTopKRouter", tensors=RouterTensors(correction_bias=("expert_bias", "gate.e_score_correction_bias")),
        fixed={"use_expert_bias": (True,)},
    ),
    Family(
        ("deepseek_v4",),
        RouterRule(
            "sqrtsoftplus", renormalize=True, epsilon=1e-20, scale=("routed_scaling_factor",),
            hash_layers=("num_hash_layers",),
        ),
        "DeepseekV4TopKRouter, DeepseekV4Experts",
        tensors=RouterTensors(
            correction_bias=("gate.bias", "gate.e_score_correction_bias"), token_ids=("gate.tid2eid",)
        ),
        activation=_CLAMPED_SILU,
        fixed={
            "scoring_func": ("sqrtsoftplus",), "topk_method": (None, "noaux_tc"), "norm_topk_prob": (None, True),
        },
        float_modules=(
            "compressor.wkv", "compressor.wgate", "compressor.kv_proj", "compressor.gate_proj", "indexer.weights_proj",
        ),
        own_scales=_HYPER_CONNECTIONS,
    ),
    # FusedMoEBlock in vLLM's step3p5.py, which refuses a router without the bias; with it, the model's remote code
    # (router_bias_func in modeling_step3p5.py, also the epsilon's source) knows only the sigmoid. SGLang's
    # Step3p5Attention (step3p5.py) keeps the gate of attention in float.
    Family(
        ("step3p5",),
        RouterRule(
            "sigmoid", renormalize=("norm_expert_weight",), epsilon=1e-20, top_k=("moe_top_k",),
            scale=("moe_router_scaling_factor",),
        ),
        "vLLM, step3p5.py, FusedMoEBlock", tensors=RouterTensors(correction_bias=("router_bias",)),
        activation=ActivationRule(limit_list=("swiglu_limits",)),
        fixed={"moe_router_activation": ("sigmoid",), "use_moe_router_bias": (True,)},
        ignored=("swiglu_limits_shared", "need_fp32_gate"), float_modules=_MTP,
        float_in_one_engine=(EngineFloat("sglang", "self_attn.g_proj"),),
    ),
)  # fmt: skip

FAMILIES: Final = (*_SOFTMAX_FAMILIES, *_SIGMOID_FAMILIES)
"""Every family that is known. Rows of one type differ in `fixed`, and the first that holds counts."""

FLOAT_ENDS: Final = tuple(dict.fromkeys(f".{name}" for family in FAMILIES for name in family.in_float_names()))
"""Ends of the names of the linears that engines keep in float in some family."""
ONE_ENGINE_ENDS: Final = tuple(f".{rule.name}" for family in FAMILIES for rule in family.float_in_one_engine)
"""Ends of the names of those that one engine alone does."""
