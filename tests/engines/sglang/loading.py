"""SGLang's model classes on the CPU: built and loaded by SGLang's own code.

Replaced, because they need a GPU or compiled code, and nothing else:
- compiled packages (``sgl_kernel``, torchvision) and a web server are modules whose names exist and do nothing;
- rotary embeddings are those of GPUs, and a GPU is named; snapshots of linear attention are not required;
- the groups of a parallel run are objects with a size and a rank: no tensor is exchanged while loading;
- the class of a model is imported by itself, not from the registry, which imports every model there is.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, cast
from unittest.mock import MagicMock, patch

import torch
from engines.expected import WHOLE, Rank
from engines.sglang.exports import model_type
from engines.stubs import Stubs
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


@contextmanager
def _classes_for_gpus() -> Iterator[None]:
    """What the modules of models looked up about the device when they were imported, as on an H200."""
    for name in CLASSES.values():
        importlib.import_module(f"sglang.srt.models.{name}")
    modules = [module for name, module in sys.modules.items() if name.startswith("sglang.srt.models.")]
    with ExitStack() as patches:
        for module in modules:
            for name, value in {"_is_cuda": True, "_device_sm": 90}.items():
                if name in vars(module):
                    patches.enter_context(patch.object(module, name, value))
        yield


class _OnCPU(TorchFunctionMode):
    """Makes on the CPU what a class asks a GPU for by name."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        return func(*args, **kwargs | ({"device": "cpu"} if kwargs.get("device") == "cuda" else {}))


_TRITON: Final = {"attention_backend": "triton"}
_ARGUMENTS: Final[dict[str, dict[str, Any]]] = {
    "gemma4_text": _TRITON,
    "glm5_next": {"mamba_track_interval": 1024},  # a multiple of the page size that a GPU has
    "gpt_oss": _TRITON,
}
"""Model type -> what it is served with."""


def build(
    folder: Path, rank: Rank = WHOLE, quantization: str | None = None, *, gpu: bool = False, **options: Any
) -> torch.nn.Module:
    """The model of a checkpoint with its parameters poisoned: -128 where they are int8, NaN where they are float.

    Args:
        gpu: whether the classes of models decide as on an NVIDIA GPU, where some compute the shared expert as the last
            of the routed ones.
        options: further arguments of SGLang.
    """
    experts = rank.size if rank.expert_parallel else 1
    chosen = {"attention_backend": "torch_native", **_ARGUMENTS.get(model_type(folder), {})}
    arguments = ServerArgs(
        model_path=str(folder), device="cpu", dtype="bfloat16", tp_size=rank.size, ep_size=experts,
        quantization=quantization, disable_cuda_graph=True, skip_tokenizer_init=True, **chosen, **options,
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
        with _OnCPU(), _classes_for_gpus() if gpu else nullcontext():
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
