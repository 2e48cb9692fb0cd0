"""Make the checkpoints in this folder with AMD Quark itself: tiny, with random weights.

Quark is not a dependency of the project. Two virtual environments, Python 3.11, CPU:
    0.13:    pip install torch==2.13.0 amd-quark==0.13 transformers==5.23.0 accelerate safetensors
    0.11.1:  pip install torch==2.13.0 amd-quark==0.11.1 transformers==4.57.6 accelerate safetensors
Then, in each (an export is made only in the environment that its name asks for: `-0.13-` or `-0.11-`):
    python make_exports.py [NAME ...]
Writes NAME/{config.json, generation_config.json, *.safetensors[, model.safetensors.index.json]} and NAME's entry of exports.json.

exports.json, per export:
    quark, flow (f2f: file-to-file, eager: in memory), scheme (what the project should call it), note
    int8, unquantized, otherwise    counts of modules with a 2-D `weight`, by stored dtype: I8, BF16/F16/F32, anything else
                        (embeddings, norms and 3-D weights are left out; every expert counts)
    claims              {"ptpc_int8": 36, "excluded": 5, ...}: the same modules by what config.json says, read by Quark's own loader
    disagree            [[module, what config.json says, stored dtype], ...]: quantization declared and not stored, or the reverse
    findings            what an inspection should find besides
"""
import argparse, collections, functools, glob, importlib.abc, importlib.machinery, importlib.util, json, os, pathlib, shutil, sys, tempfile, types
from unittest.mock import MagicMock


class _FxStubs(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Quark 0.11.1 imports two packages for its FX graph mode (not used here) that torch 2.10 removed."""

    def find_spec(self, name, path=None, target=None):
        if (name + ".").startswith(("torch.ao.quantization.pt2e.", "torch.ao.quantization.quantizer.")):
            return importlib.machinery.ModuleSpec(name, self, is_package=True)

    def create_module(self, spec):
        module = types.ModuleType(spec.name)
        module.__path__ = []
        module.__getattr__ = lambda attribute: MagicMock(name=attribute)
        return module

    def exec_module(self, module):
        pass


import torch

if importlib.util.find_spec("torch.ao.quantization.pt2e") is None:
    sys.meta_path.append(_FxStubs())
import transformers
from importlib.metadata import version
from quark.torch import LLMTemplate, ModelQuantizer, export_safetensors
from quark.torch.export.main_export.quant_config_parser import get_layer_quant_config
from quark.torch.quantization.config.config import Int8PerChannelSpec, Int8PerTensorSpec, QConfig, QLayerConfig
from safetensors import safe_open
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
VERSION = version("amd-quark")
VOCABULARY = 128
COMMON = dict(vocab_size=VOCABULARY, hidden_size=64, num_attention_heads=4, max_position_embeddings=128)


def family_config(family, layers):
    t = transformers
    common = dict(COMMON, num_hidden_layers=layers)
    if family == "qwen3":
        return t.Qwen3Config(**common, num_key_value_heads=2, head_dim=16, intermediate_size=112)
    if family == "qwen3_moe":
        return t.Qwen3MoeConfig(**common, num_key_value_heads=2, head_dim=16, intermediate_size=96, moe_intermediate_size=48, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    if family == "qwen3_moe_32":  # every width a multiple of 32, for MX formats
        return t.Qwen3MoeConfig(**common, num_key_value_heads=2, head_dim=16, intermediate_size=96, moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True)
    if family == "qwen2_moe":
        return t.Qwen2MoeConfig(**common, num_key_value_heads=4, intermediate_size=96, moe_intermediate_size=40, shared_expert_intermediate_size=56, num_experts=4, num_experts_per_tok=2, decoder_sparse_step=1)
    if family == "deepseek_v3":
        return t.DeepseekV3Config(**common, num_key_value_heads=4, intermediate_size=96, moe_intermediate_size=40, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=2, topk_group=1, routed_scaling_factor=2.5, q_lora_rank=32, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=16, v_head_dim=16, first_k_dense_replace=1)
    if family == "glm4_moe":
        return t.Glm4MoeConfig(**common, num_key_value_heads=2, head_dim=16, intermediate_size=96, moe_intermediate_size=48, n_routed_experts=4, n_shared_experts=1, num_experts_per_tok=2, n_group=1, topk_group=1, first_k_dense_replace=1)
    if family == "qwen3_5_moe":
        return t.Qwen3_5MoeConfig(
            text_config=dict(common, num_key_value_heads=2, head_dim=16, moe_intermediate_size=32, shared_expert_intermediate_size=48, num_experts=4, num_experts_per_tok=2, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8, layer_types=["linear_attention", "full_attention"]),
            vision_config=dict(depth=1, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, patch_size=4, spatial_merge_size=1, temporal_patch_size=1, num_position_embeddings=16),
            image_token_id=VOCABULARY - 4, video_token_id=VOCABULARY - 3, vision_start_token_id=VOCABULARY - 2, vision_end_token_id=VOCABULARY - 1)
    raise SystemExit(f"unknown family {family}")


def per_channel(axis, dynamic, symmetric=True):
    return Int8PerChannelSpec(symmetric=symmetric, ch_axis=axis, is_dynamic=dynamic).to_quantization_spec()


def per_tensor(dynamic):
    return Int8PerTensorSpec(symmetric=True, is_dynamic=dynamic, observer_method="min_max").to_quantization_spec()


SCHEMES = {
    "ptpc_int8": lambda: QLayerConfig(weight=per_channel(0, False), input_tensors=per_channel(1, True)),
    "int8_per_tensor_weight": lambda: QLayerConfig(weight=per_tensor(False), input_tensors=per_channel(1, True)),
    "int8_static": lambda: QLayerConfig(weight=per_tensor(False), input_tensors=per_tensor(False)),
    "int8_channel_static": lambda: QLayerConfig(weight=per_channel(0, False), input_tensors=per_tensor(False)),
    "int8_weight_only": lambda: QLayerConfig(weight=per_channel(0, False)),
    "int8_asymmetric": lambda: QLayerConfig(weight=per_channel(0, False, symmetric=False), input_tensors=per_channel(1, True)),
}

# quark: 0.13 | 0.11; flow: f2f | eager; scheme: of the whole model; layers: layer_quant_config, in order; exclude: None = the template's own
EXPORTS = {
    "qwen3_moe-0.13-f2f-attention_per_tensor": dict(
        family="qwen3_moe", layers=2, scheme="ptpc_int8", layer_config={"*self_attn*": "int8_per_tensor_weight"}, shard="60KB", truth="mixed",
        note="experts ptpc_int8, attention with one weight scale per tensor, by a pattern in layer_quant_config"),
    "qwen3_moe-0.11-eager-attention_static": dict(
        family="qwen3_moe", layers=2, scheme="ptpc_int8", truth="mixed",
        layer_config={"*layers.0.self_attn.q_proj": "ptpc_int8", "*self_attn.*": "int8_static", "model.layers.1.self_attn.o_proj": "ptpc_int8"},
        note="experts ptpc_int8, attention int8_static; the first pattern that matches wins: layer 0's q_proj is ptpc_int8, and layer 1's o_proj stays int8_static although a later key names it"),
    "qwen3_moe-0.13-f2f-experts_per_projection": dict(
        family="qwen3_moe", layers=2, scheme="ptpc_int8", layer_config={"*.experts.*.down_proj": "int8_per_tensor_weight"}, truth="mixed",
        note="within every expert gate and up are ptpc_int8 and down has one scale per tensor"),
    "qwen3_moe-0.13-f2f-some_experts_excluded": dict(
        family="qwen3_moe", layers=3, scheme="ptpc_int8", exclude=["lm_head", "*.gate", "*layers.1.mlp.experts.[02].*", "*layers.2.mlp.experts.?.down_proj"], shard="60KB", truth="ptpc_int8",
        note="layer 0: all experts int8; layer 1: experts 1 and 3 int8, 0 and 2 BF16; layer 2: gate and up int8, down BF16"),
    "qwen3_moe-0.13-f2f-layer_excluded": dict(
        family="qwen3_moe", layers=3, scheme="ptpc_int8", exclude=["lm_head", "*.gate", "*layers.1.*"], truth="ptpc_int8", note="layer 1 is BF16 altogether"),
    "qwen3_moe-0.13-f2f-exclude_patterns_on_disk": dict(
        family="qwen3_moe", layers=3, scheme="ptpc_int8", exclude=["lm_head", "*.gate", "*layers.1.*", "*layers.2.self_attn*"], truth="ptpc_int8",
        patch_exclude=["re:.*lm_head", "re:model\\.layers\\.1\\.", "*.mlp.gate", "*.layers.[2].self_attn.?_proj", "model.layers.2.self_attn"],
        note="exclude in config.json was rewritten by hand as `re:` and fnmatch patterns for the same modules; the tensors are Quark's. Quark itself knows no `re:` (its own reading is in `claims`)"),
    "qwen3_moe-0.13-f2f-re_given_to_quark": dict(
        family="qwen3_moe", layers=2, scheme="ptpc_int8", exclude=["lm_head", "*.gate", "re:.*self_attn.*"], truth="ptpc_int8", note="a `re:` pattern handed to Quark matches nothing: attention is int8, and the pattern is gone from config.json"),
    "deepseek_v3-0.13-f2f-mtp": dict(
        family="deepseek_v3", layers=2, scheme="ptpc_int8", mtp=2, shard="90KB", truth="ptpc_int8",
        note="layer 0 dense, layer 1 MoE, layer 2 = num_hidden_layers is the MTP layer with its own experts; eh_proj and shared_head.head are int8 too, attention is BF16 (the template's exclude)"),
    "glm4_moe-0.13-f2f-mtp_bf16": dict(
        family="glm4_moe", layers=2, scheme="ptpc_int8", mtp=2, exclude=["lm_head", "*mlp.gate", "*layers.2.*"], truth="ptpc_int8",
        note="layer 0 dense, layer 1 MoE, layer 2 = num_hidden_layers is the MTP layer, BF16, experts included"),
    "glm4_moe-0.13-f2f-experts_only": dict(
        family="glm4_moe", layers=3, scheme="ptpc_int8", truth="ptpc_int8", note="layer 0 dense; the template's exclude leaves only the routed experts int8"),
    "qwen2_moe-0.13-f2f-shared_expert": dict(family="qwen2_moe", layers=2, scheme="ptpc_int8", truth="ptpc_int8", note="shared_expert int8, shared_expert_gate and gate BF16; attention has biases"),
    "qwen2_moe-0.11-eager-shared_expert": dict(family="qwen2_moe", layers=2, scheme="ptpc_int8", truth="ptpc_int8", note="as the 0.13 one, BF16 scales and zero points"),
    "qwen3_5_moe-0.13-f2f-language_model": dict(
        family="qwen3_5_moe", layers=2, scheme="ptpc_int8", mtp="qwen3_5", truth="ptpc_int8",
        findings=["quantized-but-stored-float (mtp.layers.0.mlp.experts: Quark resolves exclude before it unfuses, so config.json does not list them)"],
        note="text model under model.language_model. with a nested text_config, vision tower under model.visual.; Quark unfused the 3-D experts of the source; the mtp. block is BF16"),
    "qwen3_5_moe-0.13-f2f-experts_left_3d": dict(
        family="qwen3_5_moe", layers=2, scheme="ptpc_int8", converters=False, exclude=["lm_head", "model.visual.*", "*mlp.gate", "*shared_expert_gate*", "*conv1d"], truth="ptpc_int8",
        findings=["experts-not-quantized (both layers)"],
        note="weight_converters not passed: the experts stay BF16 3-D while attention (linear and full) and shared experts are int8"),
    "qwen3_moe-0.13-f2f-wrapped": dict(
        family="qwen3_moe", layers=2, scheme="ptpc_int8", wrap="model.language_model.", truth="ptpc_int8",
        note="every `model.` of the source renamed to `model.language_model.` and the config nested under text_config before Quark saw it"),
    "qwen3_moe-0.13-f2f-ptpc_fp8": dict(family="qwen3_moe", layers=2, scheme="ptpc_fp8", truth=None, note="fp8 weights and activations: not INT8"),
    "qwen3_moe-0.13-f2f-mxfp4_experts": dict(
        family="qwen3_moe_32", layers=2, scheme="ptpc_int8", layer_config={"*.experts.*": "mxfp4"}, truth=None, findings=["scheme-unsupported (experts)"],
        note="experts MXFP4 (U8, packed), attention ptpc_int8: INT8 linears but no INT8 experts"),
    "qwen3_moe-0.13-f2f-int4_fp8": dict(family="qwen3_moe", layers=2, scheme="int4_fp8", truth=None, note="two stages: `weight` is a list in config.json, weight_scale and weight_scale_2 are stored; not INT8"),
    "qwen3_moe-0.13-f2f-int8_weight_only": dict(family="qwen3_moe", layers=2, scheme="int8_weight_only", truth=None, note="int8 weights, input_tensors null: activations are not quantized"),
    "qwen3_moe-0.13-f2f-int8_static_without_input_scale": dict(
        family="qwen3_moe", layers=2, scheme="int8_static", truth="int8_static", findings=["scale-missing (input_scale of every int8 module)"],
        note="file-to-file quantization never sees activations: static activations are declared and no input_scale is stored"),
    "qwen3_moe-0.11-eager-channel_weight_static_input": dict(family="qwen3_moe", layers=2, scheme="int8_channel_static", truth=None, note="per-channel weight with one static input scale: int8 both, but none of the three schemes"),
    "qwen3_moe-0.11-eager-asymmetric": dict(family="qwen3_moe", layers=2, scheme="int8_asymmetric", truth=None, findings=["zero-point-nonzero"], note="asymmetric weights: zero points are not zero"),
    "qwen3_moe-0.11-eager-sharded": dict(family="qwen3_moe", layers=3, scheme="ptpc_int8", shard="60KB", truth="ptpc_int8", note="in shards, BF16 scales and zero points"),
    "qwen3_moe-0.11-eager-kv_cache_fp8": dict(family="qwen3_moe", layers=2, scheme="ptpc_int8", kv="fp8", truth="ptpc_int8", note="KV cache in fp8: k_proj and v_proj have output_scale, and entries of their own in layer_quant_config and kv_cache_quant_config"),
    "qwen3_moe-0.11-f2f": dict(family="qwen3_moe", layers=2, scheme="ptpc_int8", truth="ptpc_int8", note="file-to-file of the older Quark: scales in the dtype of the weights"),
    "qwen3_moe-0.11-eager-layer_type": dict(family="qwen3_moe", layers=2, scheme="int8_static", layer_type="ptpc_int8", layer_config={"*self_attn*": "int8_per_tensor_weight"}, truth="mixed", note="layer_type_quant_config Linear is ptpc_int8, global int8_static (which so applies to nothing), attention by a key"),
    "qwen3-0.13-eager-dense": dict(family="qwen3", layers=2, scheme="ptpc_int8", truth="ptpc_int8", note="dense, on transformers 5: BF16 scales and zero points"),
    "qwen3-0.13-f2f-dense": dict(family="qwen3", layers=2, scheme="ptpc_int8", truth="ptpc_int8", note="dense"),
}


def spread(tensor, generator):
    """Scale the rows, so that per-channel scales differ by orders of magnitude as in real weights."""
    rows = torch.exp(torch.randn(tensor.shape[:-1], generator=generator).unsqueeze(-1) * 0.7)
    return tensor * rows.to(tensor.dtype)


def read(folder):
    tensors = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with safe_open(path, framework="pt") as file:
            tensors.update({name: file.get_tensor(name) for name in file.keys()})
    return tensors


def rewrite(folder, change):
    """Apply `change` to every tensor name of a sharded or single-file checkpoint."""
    index_path = os.path.join(folder, "model.safetensors.index.json")
    for path in glob.glob(os.path.join(folder, "*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {change(name): file.get_tensor(name) for name in file.keys()}
        save_file(tensors, path, metadata={"format": "pt"})
    if os.path.exists(index_path):
        index = json.load(open(index_path))
        index["weight_map"] = {change(name): file for name, file in index["weight_map"].items()}
        json.dump(index, open(index_path, "w"), indent=2)


def add_tensors(folder, extra):
    """Put `extra` into a shard of its own."""
    files = sorted(glob.glob(os.path.join(folder, "*.safetensors")))
    total = len(files) + 1
    weight_map = {}
    for number, path in enumerate(files + [None], 1):
        target = os.path.join(folder, f"model-{number:05}-of-{total:05}.safetensors")
        if path is None:
            save_file(extra, target, metadata={"format": "pt"})
        else:
            os.rename(path, target)
        with safe_open(target, framework="pt") as file:
            weight_map.update({name: os.path.basename(target) for name in file.keys()})
    size = sum(t.numel() * t.element_size() for t in read(folder).values())
    json.dump({"metadata": {"total_size": size}, "weight_map": weight_map}, open(os.path.join(folder, "model.safetensors.index.json"), "w"), indent=2)


def mtp_layer(folder, layer, config, generator):
    """An MTP layer as DeepSeek-V3 and GLM-4.5 publish it: a MoE layer after the last, which transformers drops."""
    source, prefix, extra = read(folder), f"model.layers.{layer - 1}.", {}
    fresh = lambda *shape: spread(torch.randn(*shape, generator=generator).to(torch.bfloat16) * 0.02, generator)
    for name, tensor in source.items():
        if name.startswith(prefix):
            new = tensor.clone() if tensor.dim() < 2 else fresh(*tensor.shape)
            extra[f"model.layers.{layer}." + name[len(prefix):]] = new
    hidden, p = config.hidden_size, f"model.layers.{layer}."
    extra[p + "eh_proj.weight"] = fresh(hidden, 2 * hidden)
    extra[p + "embed_tokens.weight"] = source["model.embed_tokens.weight"].clone()
    extra[p + "shared_head.head.weight"] = source["lm_head.weight"].clone()
    for norm in ("enorm", "hnorm", "shared_head.norm"):
        extra[p + norm + ".weight"] = torch.ones(hidden, dtype=torch.bfloat16)
    add_tensors(folder, extra)
    path = os.path.join(folder, "config.json")
    document = json.load(open(path))
    document["num_nextn_predict_layers"] = 1
    json.dump(document, open(path, "w"), indent=2)


def mtp_qwen3_5(folder, generator):
    """The `mtp.` block as Qwen3.5 publishes it: one full-attention MoE layer with 3-D experts."""
    source, extra = read(folder), {}
    fresh = lambda *shape: spread(torch.randn(*shape, generator=generator).to(torch.bfloat16) * 0.02, generator)
    last = max(int(n.split(".")[3]) for n in source if n.startswith("model.language_model.layers."))
    prefix = f"model.language_model.layers.{last}."
    for name, tensor in source.items():
        if name.startswith(prefix):
            extra["mtp.layers.0." + name[len(prefix):]] = tensor.clone() if tensor.dim() < 2 else fresh(*tensor.shape)
    extra["mtp.fc.weight"] = fresh(64, 128)
    for norm in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden"):
        extra[f"mtp.{norm}.weight"] = torch.ones(64, dtype=torch.bfloat16)
    add_tensors(folder, extra)


def fuse_experts(folder):
    """Stack experts.E.{gate,up,down}_proj.weight to 3-D experts.{gate_up_proj,down_proj}: the layout of public Qwen3.5 checkpoints."""
    for path in glob.glob(os.path.join(folder, "*.safetensors")):
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        prefixes = sorted({name.split(".experts.")[0] + ".experts." for name in tensors if ".experts.0." in name})
        for prefix in prefixes:
            experts = range(len({name[len(prefix):].split(".")[0] for name in tensors if name.startswith(prefix)}))
            gate, up, down = (torch.stack([tensors.pop(f"{prefix}{e}.{part}_proj.weight") for e in experts]) for part in ("gate", "up", "down"))
            tensors.update({prefix + "gate_up_proj": torch.cat([gate, up], 1), prefix + "down_proj": down})
        save_file(tensors, path, metadata={"format": "pt"})


def wrap(folder, prefix):
    rewrite(folder, lambda name: prefix + name.removeprefix("model.") if name.startswith("model.") else name)
    path = os.path.join(folder, "config.json")
    document = json.load(open(path))
    outer = {key: document[key] for key in ("dtype", "torch_dtype", "transformers_version", "tie_word_embeddings") if key in document}
    outer.update(architectures=["WrappedMoeForConditionalGeneration"], model_type="wrapped_moe", text_config=document)
    json.dump(outer, open(path, "w"), indent=2)


def make(name, spec):
    family, flow = spec["family"].removesuffix("_32"), "f2f" if "-f2f" in name else "eager"
    torch.set_default_dtype(torch.float32)  # Quark 0.11.1 leaves another behind
    torch.manual_seed(sum(map(ord, name)))
    generator = torch.Generator().manual_seed(sum(map(ord, name)) + 1)
    config = family_config(spec["family"], spec["layers"])
    if family == "qwen3_5_moe":
        model = transformers.Qwen3_5MoeForConditionalGeneration._from_config(config, dtype=torch.bfloat16).eval()
    else:
        model = transformers.AutoModelForCausalLM.from_config(config, torch_dtype=torch.bfloat16).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                parameter.copy_(spread(parameter, generator))
    for scheme, build in SCHEMES.items():
        if scheme not in LLMTemplate.get_supported_schemes():
            LLMTemplate.register_scheme(scheme, config=build())
    template = LLMTemplate.get(family)
    options = {key: value for key, value in (("layer_config", spec.get("layer_config")), ("exclude_layers", spec.get("exclude")), ("kv_cache_scheme", spec.get("kv"))) if value is not None}
    if "layer_type" in spec:
        options["layer_type_config"] = {torch.nn.Linear: spec["layer_type"]}
    quantizer = ModelQuantizer(template.get_config(scheme=spec["scheme"], **options))
    out = HERE / name
    shutil.rmtree(out, ignore_errors=True)
    if flow == "f2f":
        with tempfile.TemporaryDirectory() as source:
            model.save_pretrained(source, max_shard_size=spec.get("shard", "5GB"))
            if family == "qwen3_5_moe" and any(".experts.0." in name for name in read(source)):
                fuse_experts(source)
            if isinstance(spec.get("mtp"), int):
                mtp_layer(source, spec["mtp"], config, generator)
            elif spec.get("mtp") == "qwen3_5":
                mtp_qwen3_5(source, generator)
            if "wrap" in spec:
                wrap(source, spec["wrap"])
            extra = {"weight_converters": template.f2f_weight_converters} if spec.get("converters", True) and getattr(template, "f2f_weight_converters", None) else {}
            quantizer.direct_quantize_checkpoint(pretrained_model_path=source, save_path=str(out), device="cpu", **extra)
    else:
        data = [torch.randint(0, VOCABULARY, (2, 48)) for _ in range(6)]
        frozen = quantizer.freeze(quantizer.quantize_model(model, data))
        if "shard" in spec:
            frozen.save_pretrained = functools.partial(frozen.save_pretrained, max_shard_size=spec["shard"])
        with torch.no_grad():
            export_safetensors(frozen, str(out))
    if "patch_exclude" in spec:
        path = out / "config.json"
        document = json.load(open(path))
        document["quantization_config"]["exclude"] = spec["patch_exclude"]
        json.dump(document, open(path, "w"), indent=4)
    for path in out.iterdir():
        if path.name not in ("config.json", "generation_config.json", "model.safetensors.index.json") and path.suffix != ".safetensors":
            path.unlink()
    return describe(out, spec, flow)


def say(layer_config):
    """The project's name for a layer config, or its parts."""
    if layer_config is None:
        return "excluded"
    weight, activation = layer_config.weight, layer_config.input_tensors
    if weight is None:
        return "excluded"

    def part(spec):
        if spec is None:
            return "none"
        if isinstance(spec, list):
            return "+".join(map(part, spec))
        return f"{spec.dtype.name}/{spec.qscheme.name}/{'dynamic' if spec.is_dynamic else 'static'}" + ("" if spec.symmetric is not False else "/asymmetric")
    text = f"weight {part(weight)}, input {part(activation)}"
    names = {"weight int8/per_channel/static, input int8/per_channel/dynamic": "ptpc_int8", "weight int8/per_tensor/static, input int8/per_channel/dynamic": "int8_per_tensor_weight",
             "weight int8/per_tensor/static, input int8/per_tensor/static": "int8_static"}
    return names.get(text, text)


def describe(out, spec, flow):
    declared = QConfig.from_dict(json.load(open(out / "config.json"))["quantization_config"])
    claims, disagree, int8, plain, other = collections.Counter(), [], 0, 0, 0
    for name, tensor in sorted(read(out).items()):
        module = name.removesuffix(".weight")
        if module == name or tensor.dim() != 2 or module.endswith("norm") or "embed" in module:
            continue
        claim = say(get_layer_quant_config(declared, torch.nn.Linear, module))
        claims[claim] += 1
        stored, unquantized = tensor.dtype == torch.int8, tensor.dtype in (torch.bfloat16, torch.float16, torch.float32)
        int8, plain, other = int8 + stored, plain + unquantized, other + (not stored and not unquantized)
        if unquantized != (claim == "excluded"):
            disagree.append([module, claim, str(tensor.dtype).removeprefix("torch.")])
    return dict(quark=VERSION, flow=flow, scheme=spec["truth"], int8=int8, unquantized=plain, otherwise=other, claims=dict(sorted(claims.items())), disagree=disagree, findings=spec.get("findings", []), note=spec["note"])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*")
    arguments = parser.parse_args()
    mine = "-0.11-" if VERSION.startswith("0.11") else "-0.13-"
    truth_path = HERE / "exports.json"
    failed = []
    for name, spec in EXPORTS.items():
        if mine not in name + "-" or (arguments.names and name not in arguments.names):
            continue
        try:
            entry = make(name, spec)
        except Exception as error:  # go on with the others
            failed.append(f"{name}: {type(error).__name__}: {error}")
            continue
        truth = json.loads(truth_path.read_text()) if truth_path.exists() else {}
        truth[name] = entry
        truth_path.write_text("{\n" + ",\n".join(f"{json.dumps(k)}: {json.dumps(truth[k])}" for k in sorted(truth)) + "\n}\n")
    print("\n".join(failed) or "all made", file=sys.stderr)
    return bool(failed)


if __name__ == "__main__":
    sys.exit(main())
