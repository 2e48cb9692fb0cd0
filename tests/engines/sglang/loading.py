"""SGLang's model classes on the CPU: built and loaded by SGLang's own code.

Replaced, because they need a GPU or compiled code, and nothing else:
- compiled packages (``sgl_kernel``, torchvision) and a web server are modules whose names exist and do nothing;
- rotary embeddings are those of GPUs, and a GPU is named; snapshots of linear attention are not required;
- the groups of a parallel run are objects with a size and a rank: no tensor is exchanged while loading;
- the class of a model is imported by itself, not from the registry, which imports every model there is.
"""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast
from unittest.mock import MagicMock

import torch
from engines.expected import WHOLE, Rank, fill
from engines.published import PUBLISHED as PUBLISHED_EVERYWHERE
from engines.published import publish
from engines.stubs import Stubs
from support.checkpoints import edit_checkpoint
from torch.overrides import TorchFunctionMode
from transformers.utils.import_utils import is_torchvision_available

assert not is_torchvision_available()  # looked up once: before there is a stub of it


class _Nothing(type):
    """A class that has every attribute, each another such class."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


_STUBS = Stubs({"sgl_kernel", "torchvision", "uvicorn"}, lambda name: _Nothing(name, (), {}))
with warnings.catch_warnings(action="ignore"):
    from sglang.srt import runtime_context
    from sglang.srt.arg_groups import mamba_hook
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.layers.rotary_embedding import factory
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.weight_utils import safetensors_weights_iterator
    from sglang.srt.server_args import ServerArgs

_STUBS.packages.add("vllm")  # whose compiled rotary embedding is used on a CPU

CLASSES = {
    "BailingMoeForCausalLM": "bailing_moe",
    "BailingMoeV2ForCausalLM": "bailing_moe",
    "BailingMoeV2_5ForCausalLM": "bailing_moe_linear",
    "BailingMoeV3ForCausalLM": "bailing_moe_v3",
    "BailingMoeV3VLForConditionalGeneration": "bailing_mm_v3",
    "DbrxForCausalLM": "dbrx",
    "DeepseekForCausalLM": "deepseek",
    "DeepseekV2ForCausalLM": "deepseek_v2",
    "DeepseekV3ForCausalLM": "deepseek_v2",
    "DeepseekV32ForCausalLM": "deepseek_v2",
    "DeepseekV4ForCausalLM": "deepseek_v4",
    "Ernie4_5_MoeForCausalLM": "ernie4",
    "Ernie4_5_VLMoeForConditionalGeneration": "ernie45_vl",
    "Gemma4ForCausalLM": "gemma4_causal",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "Glm5NextForConditionalGeneration": "glm5_next",
    "GlmMoeDsaForCausalLM": "glm4_moe",
    "GptOssForCausalLM": "gpt_oss",
    "GraniteMoeHybridForCausalLM": "granitemoehybrid",
    "Grok1ForCausalLM": "grok",
    "HunYuanMoEV1ForCausalLM": "hunyuan",
    "KimiK25ForConditionalGeneration": "kimi_k25",
    "KimiK3ForConditionalGeneration": "kimi_k3",
    "KimiLinearForCausalLM": "kimi_linear",
    "Lfm2MoeForCausalLM": "lfm2_moe",
    "Llama4ForCausalLM": "llama4",
    "LongcatFlashForCausalLM": "longcat_flash",
    "MiMoV2FlashForCausalLM": "mimo_v2",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "MiniMaxM3SparseForConditionalGeneration": "minimax_m3_vl",
    "MixtralForCausalLM": "mixtral",
    "NemotronHForCausalLM": "nemotron_h",
    "OlmoeForCausalLM": "olmoe",
    "PhiMoEForCausalLM": "phimoe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Qwen3NextForCausalLM": "qwen3_next",
    "Qwen3VLMoeForConditionalGeneration": "qwen3_vl_moe",
    "Qwen3_5MoeForCausalLM": "qwen3_5_text",
    "Qwen3_5MoeForConditionalGeneration": "qwen3_5",
    "Qwen4ExpForConditionalGeneration": "qwen4_exp",
    "Step3p5ForCausalLM": "step3p5",
}
"""Architecture -> module of SGLang."""

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


class _One:
    """A group of one process."""

    def rank(self) -> int:
        return 0

    def size(self) -> int:
        return 1


@dataclass(frozen=True)
class _Group:
    world_size: int
    rank_in_group: int
    cpu_group: None = None
    device_group: _One = field(default_factory=_One)
    ca_comm: None = None
    is_first_rank: bool = True
    is_last_rank: bool = True


def _model_class(config: ModelConfig) -> tuple[type, str]:
    name = config.hf_config.architectures[0]
    return getattr(importlib.import_module(f"sglang.srt.models.{CLASSES[name]}"), name), name


def _rope(*arguments: Any) -> torch.nn.Module:
    """The rotary embedding of GPUs where that of CPUs, which knows one kind of scaling, has none."""
    make = factory.get_rope if arguments[5] is None else _rope_of_cpus
    module: torch.nn.Module = make(*arguments[: 8 if arguments[5] is None else 9])
    return module


_rope_of_cpus = factory.get_rope_cpu
loader.get_model_architecture = _model_class
factory.get_rope_cpu = _rope
mamba_hook._platform_supports_mamba_cache_extra_buffer = lambda: True
for _name in ("Stream", "Event"):
    vars(torch.cuda)[_name] = MagicMock()
vars(torch.cuda).update(current_device=lambda: 0, get_device_capability=lambda *_: (9, 0))


def prepare(folder: Path) -> Path:
    """Give a copy of an export content, and what the published models have beside it."""
    fill(folder)
    publish(folder, PUBLISHED)
    shapes = _NOT_EXPORTED.get(_model_type(folder), {})
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


class _OnCPU(TorchFunctionMode):
    """Makes on the CPU what a class asks a GPU for by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {}))


_DBRX: Final = {
    "attn_config": ("clip_qkv", "kv_n_heads", "rope_theta"),
    "ffn_config": ("ffn_hidden_size", "moe_num_experts", "moe_top_k"),
}
_TRITON: Final = {"attention_backend": "triton"}
_ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "gemma4_text": _TRITON,
    "glm5_next": {"mamba_track_interval": 1024},  # a multiple of the page size that a GPU has
    "gpt_oss": _TRITON,
}
"""Model type -> what it is served with."""


def _model_type(folder: Path) -> str:
    return str(json.loads((folder / "config.json").read_text())["model_type"])


def build(folder: Path, rank: Rank = WHOLE, quantization: str | None = None) -> torch.nn.Module:
    """The model of a checkpoint with its parameters poisoned: -128 where they are int8, NaN where they are float."""
    experts = rank.size if rank.expert_parallel else 1
    chosen = {"attention_backend": "torch_native", **_ARGUMENTS.get(_model_type(folder), {})}
    arguments = ServerArgs(
        model_path=str(folder), device="cpu", dtype="bfloat16", tp_size=rank.size, ep_size=experts,
        quantization=quantization, disable_cuda_graph=True, skip_tokenizer_init=True, **chosen,
    )  # fmt: skip
    ranks = runtime_context.SpawnRanks(world_rank=rank.rank, gpu_id=0)
    parallel = runtime_context.get_parallel()
    parallel.clear_stamp()
    runtime_context.publish(arguments, role="scheduler", ranks=ranks)
    parallel.override_permanently(
        pp_group=_Group(1, 0),
        tp_group=_Group(rank.size, rank.rank),
        attn_tp_group=_Group(rank.size, rank.rank),
        attn_cp_group=_Group(1, 0),
        moe_ep_group=_Group(experts, parallel.moe_ep_rank),
        moe_tp_group=_Group(rank.size // experts, parallel.moe_tp_rank),
    )
    config = ModelConfig.from_server_args(arguments)
    load_config = LoadConfig(load_format="safetensors")
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with _OnCPU():
            model: torch.nn.Module = loader._initialize_model(
                config, load_config, loader._get_quantization_config(config, load_config)
            )
    finally:
        torch.set_default_dtype(default)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan") if parameter.is_floating_point() else -128)
    return model


def load(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """Load a checkpoint."""
    vars(model)["_mhc_prewarmed_at_load"] = True  # DeepSeek V4 would compile kernels for a GPU
    weights = safetensors_weights_iterator(sorted(map(str, folder.glob("*.safetensors"))))
    cast("Any", model).load_weights(weights)
    return model
