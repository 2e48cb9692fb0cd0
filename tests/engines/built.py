"""Small checkpoints of families that no export in tests/data has, under the names that engines' classes load.

Quark cannot export them here: transformers has no class for them, or one that does not save the published names.
Codes, scales and floats are random.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file
from support.checkpoints import Tensors, load
from support.model import int8_linear
from support.quark_config import quark_config
from transformers import AutoConfig, PretrainedConfig

HIDDEN, INNER, EXPERTS, WORDS, LATENT = 16, 8, 4, 24, 12
GATE_UP_DOWN: Final = ("gate_proj", "up_proj", "down_proj")
W1_W3_W2: Final = ("w1", "w3", "w2")
Shapes = Mapping[str, tuple[int, ...]]

_SIZES: Final = {
    "vocab_size": WORDS, "hidden_size": HIDDEN, "intermediate_size": INNER, "moe_intermediate_size": INNER,
    "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8, "hidden_act": "silu",
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "rope_theta": 10000.0, "first_k_dense_replace": 0,
    "num_experts_per_tok": 2, "tie_word_embeddings": False, "torch_dtype": "bfloat16",
}  # fmt: skip
_LONGCAT_DERIVES: Final = ("num_hidden_layers", "hidden_act", "num_key_value_heads", "intermediate_size", "head_dim")
_EXPORT: Final = {"kv_cache_group": [], "pack_method": "reorder", "weight_format": "real_quantized"}
_MLA_SIZES: Final = {
    "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8, "head_dim": 4,
}  # fmt: skip
_VISION: Final = {
    "vt_num_attention_heads": 2, "vt_num_hidden_layers": 1, "vt_hidden_size": 16, "vt_intermediate_size": 16,
    "patch_size": 4, "init_pos_emb_height": 2, "init_pos_emb_width": 2, "merge_kernel_size": [2, 2],
}  # fmt: skip
_ATTENTION: Final[Shapes] = {f"self_attn.{name}_proj": (HIDDEN, HIDDEN) for name in "qkvo"}
_MLA: Final[Shapes] = {
    "q_a_proj": (8, HIDDEN), "q_b_proj": (16, 8), "kv_a_proj_with_mqa": (12, HIDDEN), "kv_b_proj": (24, 8),
    "o_proj": (HIDDEN, 16),
}  # fmt: skip
_NORMS: Final[Shapes] = {"input_layernorm.weight": (HIDDEN,), "post_attention_layernorm.weight": (HIDDEN,)}


def _mlp(module: str, names: Iterable[str] = GATE_UP_DOWN, width: int = HIDDEN) -> Shapes:
    gate, up, down = (f"{module}.{name}" for name in names)
    return {gate: (INNER, width), up: (INNER, width), down: (width, INNER)}


@dataclass(frozen=True)
class Built:
    """A checkpoint of one layer.

    Attributes:
        config: config.json.
        router: name of the router's linear in the layer, and its rows.
        linears: int8 linears of the layer beside the experts: name -> shape.
        excluded: linears of the layer in BF16: name -> shape.
        floats: tensors of the layer in BF16: name -> shape.
        single: tensors of the layer in F32: name -> shape.
        embedding: name of the embedding.
        moe: name of the MoE module in the layer.
        projections: names of gate, up and down of an expert.
        width: columns of gate and up of an expert.
        outer: what the names of all tensors begin with.
        body: what the names of all tensors but the head begin with.
        head: name of the head.
        last: tensors beside the layers in F32: name -> shape.
    """

    config: dict[str, Any]
    router: tuple[str, int]
    linears: Shapes
    excluded: Shapes = field(default_factory=dict)
    floats: Shapes = field(default_factory=lambda: dict(_NORMS))
    single: Shapes = field(default_factory=dict)
    embedding: str = "embed_tokens"
    moe: str = "mlp"
    projections: tuple[str, str, str] = GATE_UP_DOWN
    width: int = HIDDEN
    outer: str = ""
    body: str = "model."
    head: str = "lm_head"
    last: Shapes = field(default_factory=dict)

    def write(self, folder: Path) -> Path:
        """Write the checkpoint; returns ``folder``."""
        linears = (f"{self.body}layers.0.{name}" for name in (self.router[0], *self.excluded))
        floats = [f"{self.outer}{name}" for name in (self.head, *linears)]
        config = {**self.config, "quantization_config": quark_config(exclude=floats, export=_EXPORT)}
        folder.mkdir(parents=True)
        tensors = {f"{self.outer}{name}": tensor for name, tensor in self._tensors()}
        save_file(tensors, folder / "model.safetensors")
        (folder / "config.json").write_text(json.dumps(config))
        return folder

    def _tensors(self) -> Iterator[tuple[str, torch.Tensor]]:
        random = torch.Generator().manual_seed(2)
        names = (f"{self.moe}.experts.{expert}" for expert in range(EXPERTS))
        experts = (_mlp(name, self.projections, self.width) for name in names)
        for shapes in (self.linears, *experts):
            for name, (rows, columns) in shapes.items():
                yield from int8_linear(f"{self.body}layers.0.{name}", rows, columns).items()
        name, rows = self.router
        floats = {f"layers.0.{name}": shape for name, shape in self.floats.items()}
        floats |= {f"layers.0.{name}.weight": shape for name, shape in self.excluded.items()}
        floats |= {f"layers.0.{name}.weight": (rows, HIDDEN), "norm.weight": (HIDDEN,)}
        floats[f"{self.embedding}.weight"] = (WORDS, HIDDEN)
        for name, shape in floats.items():
            yield f"{self.body}{name}", torch.randn(shape, generator=random).bfloat16()
        yield f"{self.head}.weight", torch.randn(WORDS, HIDDEN, generator=random).bfloat16()
        single = {**{f"layers.0.{name}": shape for name, shape in self.single.items()}, **self.last}
        for name, shape in single.items():
            yield f"{self.body}{name}", torch.randn(shape, generator=random)


_BAILING: Final = {
    "attention.query_key_value": (3 * HIDDEN, HIDDEN), "attention.dense": (HIDDEN, HIDDEN),
    **_mlp("mlp.shared_experts"),
}  # fmt: skip
_BAILING_CONFIG: Final = {
    **_SIZES, "num_experts": EXPERTS, "num_shared_experts": 1, "norm_topk_prob": True, "use_bias": False,
    "use_qkv_bias": False, "embedding_dropout": 0.0, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
}  # fmt: skip
BUILT: Final = {
    "bailing_hybrid": Built(
        {**_SIZES, **_MLA_SIZES, "model_type": "bailing_hybrid", "architectures": ["BailingMoeV3ForCausalLM"],
         "num_experts": EXPERTS, "num_shared_experts": 1, "moe_shared_expert_intermediate_size": INNER, "n_group": 2,
         "topk_group": 1, "routed_scaling_factor": 2.5, "score_function": "sigmoid", "layer_group_size": 1,
         "moe_router_enable_expert_bias": True, "no_kda_lora": True, "short_conv_kernel_size": 4, "use_bias": False,
         "use_qk_norm": False, "use_qkv_bias": False},
        ("mlp.gate", EXPERTS),
        {**{f"attention.{name}": shape for name, shape in _MLA.items() if name != "o_proj"},
         "attention.dense": (HIDDEN, 16), **_mlp("mlp.shared_experts")},
        floats={**_NORMS, "attention.q_a_layernorm.weight": (8,), "attention.kv_a_layernorm.weight": (8,)},
        single={"mlp.gate.expert_bias": (EXPERTS,)}, embedding="word_embeddings",
    ),
    "deepseek": Built(
        {**_SIZES, "model_type": "deepseek", "architectures": ["DeepseekForCausalLM"], "n_routed_experts": EXPERTS,
         "n_shared_experts": 1, "moe_layer_freq": 1, "norm_topk_prob": False, "scoring_func": "softmax",
         "topk_method": "greedy", "routed_scaling_factor": 1.0},
        ("mlp.gate", EXPERTS), {**_ATTENTION, **_mlp("mlp.shared_experts")},
    ),
    "bailing_moe": Built(
        {**_BAILING_CONFIG, "model_type": "bailing_moe", "architectures": ["BailingMoeForCausalLM"]},
        ("mlp.gate", EXPERTS), _BAILING, embedding="word_embeddings",
    ),
    "bailing_moe_v2": Built(
        {**_BAILING_CONFIG, "model_type": "bailing_moe_v2", "architectures": ["BailingMoeV2ForCausalLM"],
         "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "n_group": 2, "topk_group": 1,
         "routed_scaling_factor": 2.5, "use_qk_norm": True, "use_rmsnorm": True, "partial_rotary_factor": 0.5},
        ("mlp.gate", EXPERTS), _BAILING, embedding="word_embeddings",
        floats={**_NORMS, "attention.query_layernorm.weight": (8,), "attention.key_layernorm.weight": (8,)},
        single={"mlp.gate.expert_bias": (EXPERTS,)},
    ),
    "longcat_flash": Built(
        {**{key: value for key, value in _SIZES.items() if key not in _LONGCAT_DERIVES},
         **_MLA_SIZES, "model_type": "longcat_flash", "architectures": ["LongcatFlashForCausalLM"], "num_layers": 1,
         "ffn_hidden_size": INNER, "expert_ffn_hidden_size": INNER, "n_routed_experts": EXPERTS, "zero_expert_num": 2,
         "zero_expert_type": "identity", "moe_topk": 2, "routed_scaling_factor": 6.0, "mla_scale_q_lora": False,
         "mla_scale_kv_lora": False},
        ("mlp.router.classifier", EXPERTS + 2),
        {**{f"self_attn.{half}.{name}": shape for half in range(2) for name, shape in _MLA.items()},
         **_mlp("mlps.0"), **_mlp("mlps.1")},
        floats={
            **{f"{norm}_layernorm.{half}.weight": (HIDDEN,) for norm in ("input", "post_attention") for half in "01"},
            **{f"self_attn.{half}.{name}_a_layernorm.weight": (8,) for half in "01" for name in ("q", "kv")},
        },
        single={"mlp.router.e_score_correction_bias": (EXPERTS + 2,)},
    ),
    "deepseek_v4": Built(
        {**_SIZES, "model_type": "deepseek_v4", "architectures": ["DeepseekV4ForCausalLM"], "num_key_value_heads": 1,
         "head_dim": 16, "qk_rope_head_dim": 8, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "sliding_window": 8,
         "layer_types": ["sliding_attention"], "mlp_layer_types": ["moe"], "compress_ratios": [0],
         "n_routed_experts": EXPERTS, "n_shared_experts": 1, "norm_topk_prob": True, "topk_method": "noaux_tc",
         "scoring_func": "sqrtsoftplus", "routed_scaling_factor": 1.5, "swiglu_limit": 10.0, "hc_mult": 2,
         "hc_eps": 1e-6, "hc_sinkhorn_iters": 20, "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4,
         "num_hash_layers": 0, "n_hash_layers": 0},
        ("ffn.gate", EXPERTS), _mlp("ffn.shared_experts", W1_W3_W2),
        excluded={"attn.wq_a": (8, HIDDEN), "attn.wq_b": (32, 8), "attn.wkv": (16, HIDDEN), "attn.wo_a": (16, 16),
                  "attn.wo_b": (HIDDEN, 16)},
        floats={"attn_norm.weight": (HIDDEN,), "ffn_norm.weight": (HIDDEN,), "attn.q_norm.weight": (8,),
                "attn.kv_norm.weight": (16,)},
        single={"attn.attn_sink": (2,), "ffn.gate.bias": (EXPERTS,),
                **{f"hc_{part}_{name}": shape for part in ("attn", "ffn")
                   for name, shape in (("fn", (8, 32)), ("base", (8,)), ("scale", (3,)))}},
        embedding="embed", moe="ffn", projections=W1_W3_W2, body="", head="head",
        last={"hc_head_fn": (2, 32), "hc_head_base": (2,), "hc_head_scale": (1,)},
    ),
    "grok-2": Built(
        {**_SIZES, "model_type": "git", "architectures": ["Grok1ForCausalLM"], "num_local_experts": EXPERTS,
         "hidden_act": "gelu", "router_logit_softcapping": 30.0, "residual_moe": True, "output_multiplier_scale": 1.0,
         "load_presharded_moe": False,
         "embedding_multiplier_scale": 1.0, "pad_token_id": 0},
        ("block_sparse_moe.gate", EXPERTS), {**_ATTENTION, **_mlp("mlp")},
        floats={f"{name}_norm.weight": (HIDDEN,) for name in ("pre_attn", "post_attn", "pre_moe", "post_moe")},
        moe="block_sparse_moe", projections=W1_W3_W2,
    ),
    "kimi_k3": Built(
        {"model_type": "kimi_k3", "architectures": ["KimiK3ForConditionalGeneration"], "torch_dtype": "bfloat16",
         "vision_config": {**_VISION, "qkv_hidden_size": 16},
         "text_config": {
             **_SIZES, **_MLA_SIZES, "model_type": "kimi_linear", "num_experts": EXPERTS, "num_experts_per_token": 2,
             "num_shared_experts": 1, "hidden_act": "situ", "activation_situ_beta": 4.0, "mla_use_nope": True,
             "activation_situ_linear_beta": 25.0, "routed_expert_hidden_size": LATENT, "latent_moe_use_norm": True,
             "min_moe_intermediate_per_partition": 1,
             "linear_attn_config": {"kda_layers": [], "full_attn_layers": [1], "num_heads": 2, "head_dim": 8,
                                    "short_conv_kernel_size": 4},
         }},
        ("block_sparse_moe.gate", EXPERTS),
        {**{f"self_attn.{name}": shape for name, shape in _MLA.items()}, **_mlp("block_sparse_moe.shared_experts")},
        excluded={"block_sparse_moe.routed_expert_down_proj": (LATENT, HIDDEN),
                  "block_sparse_moe.routed_expert_up_proj": (HIDDEN, LATENT)},
        floats={**_NORMS, "self_attn.q_a_layernorm.weight": (8,), "self_attn.kv_a_layernorm.weight": (8,),
                "block_sparse_moe.routed_expert_norm.weight": (LATENT,)},
        single={"block_sparse_moe.gate.e_score_correction_bias": (EXPERTS,)},
        moe="block_sparse_moe", projections=W1_W3_W2, width=LATENT, outer="language_model.",
    ),
    "llama4": Built(
        {**_SIZES, "model_type": "llama4_text", "architectures": ["Llama4ForCausalLM"], "intermediate_size_mlp": INNER,
         "num_local_experts": EXPERTS, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1, "moe_layers": [0],
         "use_qk_norm": False, "no_rope_layers": [1], "attention_chunk_size": 64},
        ("feed_forward.router", EXPERTS), {**_ATTENTION, **_mlp("feed_forward.shared_expert")}, moe="feed_forward",
    ),
}  # fmt: skip
"""Family -> its checkpoint."""
BUILT["bailing_hybrid_v2.5"] = replace(
    BUILT["bailing_hybrid"], config=BUILT["bailing_hybrid"].config | {"architectures": ["BailingMoeV2_5ForCausalLM"]}
)
_V3: Final = BUILT["bailing_hybrid"]
BUILT["bailing_moe_v3_vl"] = replace(
    _V3,
    config={
        "model_type": "bailing_moe_v3_vl", "architectures": ["BailingMoeV3VLForConditionalGeneration"],
        "torch_dtype": "bfloat16", "text_config": _V3.config, "mrope_section": [0, 1, 1],
        "vision_config": {
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2, "out_hidden_size": 16, "num_position_embeddings": 4,
            "deepstack_visual_indexes": [],
        },
    },
)  # fmt: skip

_REMOTE: Final = ("deepseek", "bailing_moe", "bailing_moe_v2")
"""Model types whose config class comes with the published model; here a config without defaults stands for it."""
for _name in _REMOTE:
    AutoConfig.register(_name, type(f"Remote_{_name}", (PretrainedConfig,), {"model_type": _name}), exist_ok=True)


class _ErnieVL(PretrainedConfig):
    """The same for the one with a part for images."""

    model_type = "ernie4_5_moe_vl"

    def __init__(self, vision_config: Mapping[str, Any] | None = None, **fields: Any) -> None:
        self.vision_config = PretrainedConfig(**(vision_config or {}))
        super().__init__(**fields)


AutoConfig.register(_ErnieVL.model_type, _ErnieVL, exist_ok=True)


def kimi_k2(source: Path, folder: Path) -> Path:
    """DeepSeek V3's export under the model type of Kimi K2, which has its architecture."""
    tensors: Tensors = load(source)
    config = json.loads((source / "config.json").read_text())
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    published = {"model_type": "kimi_k2", "topk_method": "noaux_tc", "scoring_func": "sigmoid"}
    (folder / "config.json").write_text(json.dumps(config | published))
    return folder


def ernie_vl(source: Path, folder: Path) -> Path:
    """The export of ERNIE 4.5 VL file to file, with the flat config of the published models, and no image encoder."""
    tensors = {name: tensor for name, tensor in load(source).items() if name.startswith("model.layers.0.")}
    random = torch.Generator().manual_seed(2)
    for name, shape in {"embed_tokens": (WORDS, HIDDEN), "norm": (HIDDEN,)}.items():
        tensors[f"model.{name}.weight"] = torch.randn(shape, generator=random).bfloat16()
    exported = json.loads((source / "config.json").read_text())
    config = {
        **exported["text_config"], "model_type": "ernie4_5_moe_vl", "architectures": exported["architectures"],
        "torch_dtype": "bfloat16", "quantization_config": exported["quantization_config"], "moe_layer_interval": 1,
        "moe_num_experts": [EXPERTS, EXPERTS], "moe_layer_start_index": [0, 0], "moe_layer_end_index": [0, 0],
        "freq_allocation": 2, "rope_theta": 10000.0, "rope_scaling": {"type": "default", "mrope_section": [1, 1, 2]},
        "pixel_hidden_size": 16, "spatial_conv_size": 2, "temporal_conv_size": 2, "im_patch_id": 20, "use_moe": True,
        "use_temporal_conv": True,
        "vision_config": {
            "depth": 1, "embed_dim": 16, "hidden_size": 16, "in_channels": 3, "in_chans": 3, "mlp_ratio": 1,
            "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "hidden_act": "quick_gelu",
        },
    }  # fmt: skip
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    return folder
