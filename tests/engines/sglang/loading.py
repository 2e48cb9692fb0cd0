"""SGLang's model classes on the CPU: built and loaded by SGLang's own code.

Replaced, because they need a GPU or compiled code, and nothing else:
- packages of compiled kernels (``sgl_kernel``) and torchvision are modules whose names exist and do nothing;
- the groups of a parallel run are objects with a size and a rank: no tensor is exchanged while loading;
- the class of a model is imported by itself, not from the registry, which imports every model there is.
"""

from __future__ import annotations

import importlib
import json
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from engines.expected import WHOLE, Rank, fill
from engines.stubs import Stubs
from transformers.utils.import_utils import is_torchvision_available

assert not is_torchvision_available()  # looked up once: before there is a stub of it


class _Nothing(type):
    """A class that has every attribute, each another such class."""

    def __getattr__(cls, name: str) -> type:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Nothing(name, (), {})


_STUBS = Stubs({"sgl_kernel", "torchvision"}, lambda name: _Nothing(name, (), {}))
with warnings.catch_warnings(action="ignore"):
    from sglang.srt import runtime_context
    from sglang.srt.configs.load_config import LoadConfig
    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.model_loader import loader
    from sglang.srt.model_loader.weight_utils import safetensors_weights_iterator
    from sglang.srt.server_args import ServerArgs

_STUBS.packages.add("vllm")  # whose compiled rotary embedding is used on a CPU

CLASSES = {
    "DeepseekV3ForCausalLM": "deepseek_v2",
    "Ernie4_5_MoeForCausalLM": "ernie4",
    "Glm4MoeForCausalLM": "glm4_moe",
    "Glm4MoeLiteForCausalLM": "glm4_moe_lite",
    "Lfm2MoeForCausalLM": "lfm2_moe",
    "MiniMaxM2ForCausalLM": "minimax_m2",
    "MixtralForCausalLM": "mixtral",
    "OlmoeForCausalLM": "olmoe",
    "Qwen2MoeForCausalLM": "qwen2_moe",
    "Qwen3MoeForCausalLM": "qwen3_moe",
    "Step3p5ForCausalLM": "step3p5",
}
"""Architecture -> module of SGLang."""

PUBLISHED: dict[str, dict[str, Any]] = {
    "minimax_m2": {"rotary_dim": 16, "scoring_func": "sigmoid", "use_routing_bias": True, "use_qk_norm": True},
    "deepseek_v3": {
        "topk_method": "noaux_tc", "scoring_func": "sigmoid", "moe_layer_freq": 1,
        "rope_parameters": {
            "rope_theta": 10000.0, "rope_type": "yarn", "type": "yarn", "factor": 40, "beta_fast": 32, "beta_slow": 1,
            "original_max_position_embeddings": 4096, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
}  # fmt: skip
"""Model type -> fields that the published models have in config.json, SGLang reads, and the fixtures lack."""


@dataclass(frozen=True)
class _Group:
    world_size: int
    rank_in_group: int
    cpu_group: None = None
    device_group: None = None
    is_first_rank: bool = True
    is_last_rank: bool = True


def _model_class(config: ModelConfig) -> tuple[type, str]:
    name = config.hf_config.architectures[0]
    return getattr(importlib.import_module(f"sglang.srt.models.{CLASSES[name]}"), name), name


loader.get_model_architecture = _model_class


def prepare(folder: Path) -> Path:
    """Give a copy of an export content, and what the published models have in config.json."""
    fill(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | PUBLISHED.get(config["model_type"], {})))
    return folder


def build(folder: Path, rank: Rank = WHOLE, quantization: str | None = None) -> torch.nn.Module:
    """The model of a checkpoint with its parameters poisoned: -128 where they are int8, NaN where they are float."""
    experts = rank.size if rank.expert_parallel else 1
    arguments = ServerArgs(
        model_path=str(folder), device="cpu", dtype="bfloat16", tp_size=rank.size, ep_size=experts,
        quantization=quantization, attention_backend="torch_native", disable_cuda_graph=True, skip_tokenizer_init=True,
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
    weights = safetensors_weights_iterator(sorted(map(str, folder.glob("*.safetensors"))))
    cast("Any", model).load_weights(weights)
    return model
