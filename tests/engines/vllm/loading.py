"""vLLM's model classes on the CPU: built as vLLM builds them, loaded by vLLM's own loader.

Replaced, because they need a machine or compiled code, and nothing else:
- the platform is vLLM's CPU platform (``VLLM_TARGET_DEVICE``);
- where vLLM chooses a kernel for experts, which looks at the device, it sees one of CUDA;
- the processor has AMX, whose attention vLLM chooses for some models and for an FP8 cache: it refuses them on others;
- sparse attention, of which a CPU has no kernel, is that of DeepSeek V3; FlashAttention exists;
- the ranks of a parallel group are set by hand: no tensor is exchanged while loading;
- model classes are inspected in this process instead of in one of their own, which would import vLLM again;
- DeepSeek V4 has the class of NVIDIA GPUs, for compute capability 9.0, not that of CPUs;
- torchvision, timm, CUTLASS and CUDA's Python packages are modules that do nothing; so are streams and tokenizers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
from engines.expected import WHOLE, Rank
from engines.stubs import Stubs
from vllm import tokenizers
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe import config as fused_moe_config
from vllm.model_executor.layers.fused_moe.experts import triton_moe
from vllm.model_executor.layers.fused_moe.oracle import unquantized
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm.platforms.cpu import CpuPlatform
from vllm.v1.attention.backends import fa_utils

_CUDA = SimpleNamespace(
    is_cuda_alike=lambda: True,
    is_cuda=lambda: True,
    is_rocm=lambda: False,
    is_xpu=lambda: False,
    is_cpu=lambda: False,
    is_tpu=lambda: False,
    is_out_of_tree=lambda: False,
    has_device_capability=lambda _: True,
    is_device_capability_family=lambda _: False,
    supports_fp8=lambda: True,
    fp8_dtype=lambda: torch.float8_e4m3fn,
)
torch.cpu._is_amx_tile_supported = lambda: True
triton_moe.current_platform = fused_moe_config.current_platform = unquantized.current_platform = _CUDA
fa_utils.is_flash_attn_varlen_func_available = lambda: True
vars(fa_utils)["__getattr__"] = lambda name: MagicMock(name=name)
registry._run_in_subprocess = lambda function: function()
registry._LazyRegisteredModel._load_modelinfo_from_cache = lambda *_: None
registry._LazyRegisteredModel._save_modelinfo_to_cache = lambda *_: None
Stubs({"torchvision", "cutlass", "cuda", "timm"}, lambda name: MagicMock(name=name))
for _name in ("gelu_new", "gelu_quick"):  # of image encoders
    torch.library.define(f"_C::{_name}", "(Tensor! out, Tensor input) -> ()")
vars(torch.cuda).update(Stream=MagicMock(), Event=MagicMock())
tokenizers.cached_tokenizer_from_config = MagicMock()


LANGUAGE_MODEL_ONLY = ("aria", "bailing_moe_v3_vl", "deepseek_vl_v2", "ernie4_5_moe_vl", "kimi_k25", "kimi_k3")
"""Model types whose image encoder the checkpoints have not here, or whose experts are looked at only."""


_v4 = "vllm.models.deepseek_v4"
vars(import_module(_v4))["DeepseekV4ForCausalLM"] = import_module(f"{_v4}.nvidia.model").DeepseekV4ForCausalLM
vars(import_module(f"{_v4}.nvidia.flashmla"))["compute_fp8_einsum_recipe"] = lambda: ((1, 128, 128), False)


def _attention_backend(selected_backend: Any, attn_selector_config: Any, num_heads: int | None = None) -> str:
    if attn_selector_config.use_sparse:
        return "engines.vllm.sparse_attention.SparseAttention"  # a name, since vLLM before 0.28 has no class for it
    return str(_choose_attention(selected_backend, attn_selector_config, num_heads))


_choose_attention = CpuPlatform.get_attn_backend_cls
CpuPlatform.get_attn_backend_cls = staticmethod(_attention_backend)


def engine_config(folder: Path, rank: Rank = WHOLE) -> VllmConfig:
    """vLLM's configuration for a checkpoint."""
    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    arguments = EngineArgs(
        str(folder), dtype="bfloat16", load_format="safetensors", max_model_len=64, enforce_eager=True,
        skip_tokenizer_init=True, use_tqdm_on_load=False, language_model_only=model_type in LANGUAGE_MODEL_ONLY,
    )  # fmt: skip
    config = arguments.create_engine_config()
    config.parallel_config.tensor_parallel_size = rank.size
    config.parallel_config.enable_expert_parallel = rank.expert_parallel
    return config


def build(folder: Path, rank: Rank = WHOLE) -> torch.nn.Module:
    """The model of a checkpoint with its parameters poisoned: -128 where they are int8, NaN where they are float."""
    config = engine_config(folder, rank)
    with _as_rank(config, rank):
        model: torch.nn.Module = initialize_model(config)
    for parameter in model.parameters():
        parameter.data.fill_(float("nan") if parameter.is_floating_point() else -128)
    vars(model)["engine_config"] = config
    return model


def load(model: torch.nn.Module, rank: Rank = WHOLE) -> torch.nn.Module:
    """Load the checkpoint that a model was built for."""
    config: VllmConfig = vars(model)["engine_config"]
    with _as_rank(config, rank):
        get_model_loader(config.load_config).load_weights(model, config.model_config)
    return model


@contextmanager
def _as_rank(config: VllmConfig, rank: Rank) -> Iterator[None]:
    os.environ.pop("VLLM_MLA_DISABLE", None)  # set for the rest of the process by models of transformers
    with set_current_vllm_config(config):
        if parallel_state._TP is None:
            store = f"file:///tmp/vllm-rendezvous-{os.getpid()}"
            init_distributed_environment(1, 0, store, 0, "gloo")
            initialize_model_parallel(1, 1)
        group = parallel_state._TP
        group.world_size, group.rank_in_group = rank.size, rank.rank
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.bfloat16)
        try:
            yield
        finally:
            torch.set_default_dtype(default)
            group.world_size, group.rank_in_group = 1, 0
