"""vLLM's model classes on the CPU: built as vLLM builds them, loaded by vLLM's own loader.

Replaced, because they need a machine or compiled code, and nothing else:
- the platform is vLLM's CPU platform (``VLLM_TARGET_DEVICE``);
- where vLLM chooses a kernel for INT8 experts, which looks at the device, it sees one of CUDA;
- the ranks of a parallel group are set by hand: no tensor is exchanged while loading;
- model classes are inspected in this process instead of in one of their own, which would import vLLM again;
- torchvision, which is compiled, is an empty module: the classes of models that also take images import it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace

os.environ["VLLM_TARGET_DEVICE"] = "cpu"
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch
from engines.expected import WHOLE, Rank
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.fused_moe.experts import triton_moe
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry

triton_moe.current_platform = SimpleNamespace(
    is_cuda_alike=lambda: True,
    is_cuda=lambda: True,
    is_rocm=lambda: False,
    is_xpu=lambda: False,
    has_device_capability=lambda _: True,
    supports_fp8=lambda: True,
)
registry._run_in_subprocess = lambda function: function()
registry._LazyRegisteredModel._load_modelinfo_from_cache = lambda *_: None
registry._LazyRegisteredModel._save_modelinfo_to_cache = lambda *_: None
for name in (
    "torchvision",
    "torchvision.transforms",
    "torchvision.transforms.v2",
    "torchvision.transforms.v2.functional",
):
    sys.modules.setdefault(name, ModuleType(name))
    sys.modules[name].__spec__ = ModuleSpec(name, None)
vars(sys.modules["torchvision.transforms.v2"])["functional"] = sys.modules["torchvision.transforms.v2.functional"]


def engine_config(folder: Path, rank: Rank = WHOLE) -> VllmConfig:
    """vLLM's configuration for a checkpoint."""
    arguments = EngineArgs(
        str(folder), dtype="bfloat16", load_format="safetensors", max_model_len=64, enforce_eager=True,
        skip_tokenizer_init=True, use_tqdm_on_load=False,
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
