"""Make the checkpoints in this folder with AMD Quark itself: one of every family that transformers can build, tiny.

    pip install torch==2.13.0 amd-quark==0.13 transformers==5.24.0 accelerate safetensors
    python make_families.py [NAME ...]

Writes NAME/{config.json, model.safetensors}. NAME is the model type and how Quark ran: `f2f` file-to-file over what
transformers saved, which has the names of the published checkpoints, `eager` in memory, where Quark replaces the
experts by its own modules. All linears are ptpc_int8 but those that the family's template excludes; families without a
template get one here. Every MoE layer has 4 experts, of which 2 per token; weights are random.
"""

import json
import os
import pathlib
import shutil
import sys
import tempfile
import warnings

warnings.filterwarnings("ignore")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
import transformers
from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors
from quark.torch.quantization.config.config import Int8PerChannelSpec, QLayerConfig
from quark.torch.utils.llm import preprocess_for_quantization
from safetensors import safe_open
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
HIDDEN, INNER, EXPERTS, VOCABULARY = 16, 8, 4, 24
COMMON = dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
              max_position_embeddings=64, num_hidden_layers=1)  # fmt: skip
QWEN = dict(COMMON, intermediate_size=INNER, moe_intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=2,
            decoder_sparse_step=1)  # fmt: skip
MLA = dict(q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8)
V3 = dict(COMMON, **MLA, intermediate_size=INNER, moe_intermediate_size=INNER, n_routed_experts=EXPERTS,
          n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, first_k_dense_replace=0,
          norm_topk_prob=True, routed_scaling_factor=2.5)  # fmt: skip
VISION = dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=HIDDEN, patch_size=4,
              spatial_merge_size=1, temporal_patch_size=1, num_position_embeddings=4)  # fmt: skip
CLIP = dict(num_hidden_layers=1, hidden_size=16, intermediate_size=16, num_attention_heads=2, patch_size=4, image_size=8)
MIXTRAL = dict(COMMON, intermediate_size=INNER, num_local_experts=EXPERTS, num_experts_per_tok=2)

# model type: (class of the model, its config's class, config, what is excluded where Quark has no template)
FAMILIES = {
    "mixtral": ("MixtralForCausalLM", "MixtralConfig", MIXTRAL),
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", dict(QWEN, shared_expert_intermediate_size=INNER)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", "Qwen3MoeConfig", dict(QWEN, norm_topk_prob=True)),
    "deepseek_v2": ("DeepseekV2ForCausalLM", "DeepseekV2Config", dict(V3, norm_topk_prob=False, topk_method="greedy")),
    "deepseek_v3": ("DeepseekV3ForCausalLM", "DeepseekV3Config", V3),
    "deepseek_v32": ("DeepseekV32ForCausalLM", "DeepseekV32Config", dict(V3, index_n_heads=2, index_head_dim=8)),
    "glm4_moe": ("Glm4MoeForCausalLM", "Glm4MoeConfig", V3),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", "Glm4MoeLiteConfig", dict(V3, mlp_layer_types=["sparse"])),
    "glm_moe_dsa": ("GlmMoeDsaForCausalLM", "GlmMoeDsaConfig", dict(V3, index_n_heads=2, index_head_dim=8)),
    "minimax_m2": ("MiniMaxM2ForCausalLM", "MiniMaxM2Config", dict(MIXTRAL, rotary_dim=4)),
    "gpt_oss": ("GptOssForCausalLM", "GptOssConfig", dict(MIXTRAL)),
    "granitemoehybrid": ("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig",
                         dict(MIXTRAL, shared_intermediate_size=INNER, layer_types=["attention"], mamba_n_heads=4)),
    "llama4": ("Llama4ForCausalLM", "Llama4TextConfig", dict(MIXTRAL, intermediate_size_mlp=INNER)),
    "gemma4": ("Gemma4ForCausalLM", "Gemma4TextConfig",
               dict(COMMON, intermediate_size=INNER, moe_intermediate_size=INNER, num_experts=EXPERTS, top_k_experts=2,
                    enable_moe_block=True, hidden_size_per_layer_input=0, global_head_dim=8, num_global_key_value_heads=2,
                    vocab_size_per_layer_input=VOCABULARY, layer_types=["full_attention"])),
    "dbrx": ("DbrxForCausalLM", "DbrxConfig",
             dict(d_model=HIDDEN, n_heads=2, n_layers=1, max_seq_len=64, vocab_size=VOCABULARY,
                  attn_config=dict(kv_n_heads=2, clip_qkv=8.0, rope_theta=10000.0),
                  ffn_config=dict(hidden_size=HIDDEN, ffn_hidden_size=INNER, moe_num_experts=EXPERTS, moe_top_k=2))),
    "deepseek_v4": ("DeepseekV4ForCausalLM", "DeepseekV4Config",
                    dict(COMMON, num_hidden_layers=2, num_key_value_heads=1, moe_intermediate_size=INNER, n_routed_experts=EXPERTS, n_shared_experts=1,
                         num_experts_per_tok=2, num_hash_layers=1, q_lora_rank=8, o_lora_rank=8, o_groups=2,
                         index_n_heads=2, index_head_dim=8, index_topk=4, hc_mult=2)),
    "minimax_m3_vl": ("MiniMaxM3SparseForConditionalGeneration", "MiniMaxM3VLConfig",
                      dict(text_config=dict(MIXTRAL, dense_intermediate_size=INNER, shared_intermediate_size=INNER,
                                            mlp_layer_types=["sparse"], rotary_dim=4),
                           vision_config=CLIP, projector_hidden_size=16, merged_hidden_size=16)),
    "glm5_next": ("Glm5NextForConditionalGeneration", "Glm5NextConfig",
                  dict(text_config=dict(V3, qk_rope_head_dim=0, mlp_layer_types=["sparse"], layer_types=["full_attention"], index_n_heads=2,
                                        index_head_dim=8, index_topk=16, pad_token_id=0, linear_num_heads=2, linear_head_dim=8),
                       vision_config=dict(VISION, projection_intermediate_size=16))),
    "kimi_linear": ("KimiLinearForCausalLM", "KimiLinearConfig",
                    dict(COMMON, **MLA, intermediate_size=INNER, moe_intermediate_size=INNER, num_experts=EXPERTS,
                         num_experts_per_token=2, num_expert_group=1, topk_group=1, num_shared_experts=1, first_k_dense_replace=0, pad_token_id=0,
                         linear_num_heads=2, linear_head_dim=8)),
    "nemotron_h": ("NemotronHForCausalLM", "NemotronHConfig",
                   dict(COMMON, intermediate_size=INNER, moe_intermediate_size=INNER,
                        moe_shared_expert_intermediate_size=INNER, n_routed_experts=EXPERTS, num_experts_per_tok=2,
                        n_group=2, topk_group=1, layers_block_type=["attention", "moe"], mamba_num_heads=2,
                        mamba_head_dim=8, ssm_state_size=8)),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", "Ernie4_5_MoeConfig",
                     dict(COMMON, intermediate_size=INNER, moe_intermediate_size=INNER, moe_num_experts=EXPERTS, moe_k=2,
                          moe_num_shared_experts=1, moe_layer_start_index=0, moe_layer_end_index=0)),
    "ernie4_5_vl_moe": ("Ernie4_5_VLMoeForConditionalGeneration", "Ernie4_5_VLMoeConfig",
                        dict(text_config=dict(COMMON, intermediate_size=INNER, moe_intermediate_size=[INNER, 4],
                                              moe_num_experts=EXPERTS, moe_k=2, moe_num_shared_experts=1,
                                              mlp_layer_types=["sparse"],
                                              rope_parameters=dict(rope_type="default", rope_theta=10000.0,
                                                                   mrope_section=[1, 1, 2])),
                             vision_config=dict(depth=1, hidden_size=16, embed_dim=16, intermediate_size=16, num_heads=2))),
    "hunyuan_v1_moe": ("HunYuanMoEV1ForCausalLM", "HunYuanMoEV1Config",
                       dict(COMMON, intermediate_size=INNER, num_experts=EXPERTS, moe_topk=2)),
    "longcat_flash": ("LongcatFlashForCausalLM", "LongcatFlashConfig",
                      dict(vocab_size=VOCABULARY, hidden_size=HIDDEN, num_attention_heads=2, num_layers=1, **MLA,
                           ffn_hidden_size=INNER, expert_ffn_hidden_size=INNER, n_routed_experts=EXPERTS,
                           zero_expert_num=2, moe_topk=2, head_dim=4, max_position_embeddings=64)),
    "bailing_hybrid": ("BailingHybridForCausalLM", "BailingHybridConfig",
                       dict(COMMON, **MLA, intermediate_size=INNER, moe_intermediate_size=INNER, num_experts=EXPERTS,
                            num_experts_per_token=2, num_expert_group=2, topk_group=1, num_shared_experts=1,
                            first_k_dense_replace=0, linear_num_heads=2, linear_head_dim=8, pad_token_id=0)),
    "lfm2_moe": ("Lfm2MoeForCausalLM", "Lfm2MoeConfig",
                 dict(COMMON, intermediate_size=INNER, moe_intermediate_size=INNER, num_experts=EXPERTS,
                      num_experts_per_tok=2, num_dense_layers=0, layer_types=["full_attention"])),
    "mimo_v2_flash": ("MiMoV2FlashForCausalLM", "MiMoV2FlashConfig",
                      dict(COMMON, intermediate_size=INNER, moe_intermediate_size=INNER, n_routed_experts=EXPERTS,
                           num_experts_per_tok=2, n_group=1, topk_group=1, v_head_dim=8, swa_num_attention_heads=2,
                           swa_num_key_value_heads=2, swa_head_dim=8, swa_v_head_dim=8,
                           layer_types=["full_attention"], mlp_layer_types=["sparse"])),
    "jamba": ("JambaForCausalLM", "JambaConfig",
              dict(COMMON, num_hidden_layers=1, intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=2,
                   attn_layer_period=1, attn_layer_offset=0, expert_layer_period=1, expert_layer_offset=0,
                   use_mamba_kernels=False)),
    "olmoe": ("OlmoeForCausalLM", "OlmoeConfig",
              dict(COMMON, intermediate_size=INNER, num_experts=EXPERTS, num_experts_per_tok=2)),
    "phimoe": ("PhimoeForCausalLM", "PhimoeConfig", MIXTRAL),
    "aria": ("AriaForConditionalGeneration", "AriaConfig",
             dict(text_config=dict(COMMON, intermediate_size=INNER, moe_num_experts=EXPERTS, moe_topk=2, moe_num_shared_experts=1,
                                   pad_token_id=0),
                  vision_config=dict(CLIP, model_type="idefics3_vision"), projector_patch_to_query_dict={4: 2})),
    "qwen3_next": ("Qwen3NextForCausalLM", "Qwen3NextConfig",
                   dict(QWEN, norm_topk_prob=True, shared_expert_intermediate_size=INNER, layer_types=["full_attention"])),
    "qwen3_5_moe": ("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig",
                    dict(QWEN, shared_expert_intermediate_size=INNER, layer_types=["full_attention"])),
    "qwen3_vl_moe": ("Qwen3VLMoeForConditionalGeneration", "Qwen3VLMoeConfig",
                     dict(text_config=dict(QWEN, rope_scaling=dict(rope_type="default", mrope_section=[2, 1, 1])),
                          vision_config=dict(depth=1, hidden_size=16, intermediate_size=16, num_heads=2, out_hidden_size=HIDDEN,
                                             patch_size=4, spatial_merge_size=1, temporal_patch_size=1,
                                             num_position_embeddings=4, deepstack_visual_indexes=[]),
                          image_token_id=20, video_token_id=21, vision_start_token_id=22, vision_end_token_id=23)),
    "qwen4_exp": ("Qwen4ExpForCausalLM", "Qwen4ExpTextConfig",
                  dict(QWEN, norm_topk_prob=True, shared_expert_intermediate_size=INNER, layer_types=["full_attention"],
                       indexer_n_heads=2, indexer_kv_heads=1, indexer_head_dim=8, indexer_budget=4, hc_lowrank=8,
                       indexer_compress_ratio=2)),
}  # fmt: skip
EXCLUDED = ["lm_head", "*.gate", "*router*", "*.gate.wg", "*shared_expert_gate", "*conv*", "*embed*", "*wg"]


def scheme():
    channels = [Int8PerChannelSpec(symmetric=True, ch_axis=axis, is_dynamic=bool(axis)).to_quantization_spec()
                for axis in (0, 1)]  # fmt: skip
    return QLayerConfig(weight=channels[0], input_tensors=channels[1])


def template_of(family):
    try:
        return LLMTemplate.get({"minimax_m3_vl": "minimax_m3_vl"}.get(family, family))
    except Exception:
        LLMTemplate.register_template(
            LLMTemplate(model_type=family, kv_layers_name=["*k_proj", "*v_proj"], q_layer_name="*q_proj",
                        exclude_layers_name=EXCLUDED)
        )  # fmt: skip
        return LLMTemplate.get(family)


def build(family):
    model_class, config_class, settings = FAMILIES[family]
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(sum(map(ord, family)))
    config = getattr(transformers, config_class)(**settings)
    model = getattr(transformers, model_class)._from_config(config, dtype=torch.bfloat16).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() >= 2 or name.endswith("bias"):
                values = torch.randn(parameter.shape, generator=generator)
                parameter.copy_(values * (0.2 if parameter.is_floating_point() else 0))
        for name, buffer in model.named_buffers():
            if name.endswith(("e_score_correction_bias", "expert_bias")):
                buffer.copy_(torch.randn(buffer.shape, generator=generator) * 0.1)
            if name.endswith("tid2eid"):
                buffer.copy_(torch.stack([torch.randperm(EXPERTS, generator=generator)[:2] for _ in range(len(buffer))]))
    return model


def export(family, flow, out):
    model = build(family)
    template = template_of(family)
    if "ptpc_int8" not in LLMTemplate.get_supported_schemes():
        LLMTemplate.register_scheme("ptpc_int8", config=scheme())
    quantizer = ModelQuantizer(template.get_config(scheme="ptpc_int8"))
    shutil.rmtree(out, ignore_errors=True)
    if flow == "f2f":
        with tempfile.TemporaryDirectory() as source:
            model.save_pretrained(source)
            converters = getattr(template, "f2f_weight_converters", None)
            extra = {"weight_converters": converters} if converters else {}
            quantizer.direct_quantize_checkpoint(pretrained_model_path=source, save_path=str(out), device="cpu", **extra)
    else:
        data = [torch.randint(0, VOCABULARY, (1, 8)) for _ in range(2)]
        preprocess_for_quantization(model)
        frozen = quantizer.freeze(quantizer.quantize_model(model, data))
        with torch.no_grad():
            export_safetensors(frozen, str(out))
    tensors = {}
    for path in sorted(out.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
        path.unlink()
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    for path in out.iterdir():
        if path.name not in ("config.json", "model.safetensors"):
            path.unlink()
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config, separators=(",", ":")) + "\n")


def main():
    failed = []
    for name in sys.argv[1:] or [f"{family}-0.13-{flow}" for family in FAMILIES for flow in ("f2f", "eager")]:
        family, _, flow = name.rsplit("-", 2)
        try:
            export(family, flow, HERE / name)
        except Exception as error:  # go on with the others
            shutil.rmtree(HERE / name, ignore_errors=True)
            failed.append(f"{name}: {type(error).__name__}: {str(error)[-300:]}")
    print("\n".join(failed) or "all made", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
