"""vllm-ascend's config and its linear and MoE methods on the CPU, in vLLM's model classes, loaded by vLLM's own loader.

Replaced, because they need an NPU or compiled code, and nothing else:
- ``torch_npu`` and ``torch.npu``, which need Ascend's CANN, are mocks: no kernel runs while weights are loaded;
- the platform is vLLM's CPU platform, and vllm-ascend's plugins, which patch vLLM for its own, are not loaded;
- the communication group of the MoE method is absent, for which the method has a fallback;
- model classes are inspected in this process instead of in one of their own, which would import vLLM again.
"""

# ruff: noqa: E402  mocks must be there before what imports them
from __future__ import annotations

import os
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from unittest.mock import MagicMock

os.environ["VLLM_PLUGINS"] = ""
os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
os.environ["VLLM_NO_USAGE_STATS"] = "1"

import torch

NPU = MagicMock(name="torch_npu")
NPU.__spec__, NPU.__path__ = ModuleSpec("torch_npu", None), []
sys.modules.update(dict.fromkeys(("torch_npu", "torch_npu.npu", "torch_npu.profiler"), NPU))
vars(torch)["npu"] = NPU.npu

import vllm.platforms
from vllm.platforms.cpu import CpuPlatform

vars(vllm.platforms)["_current_platform"] = CpuPlatform()

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel, parallel_state
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.model_loader import get_model_loader
from vllm.model_executor.model_loader.utils import initialize_model
from vllm.model_executor.models import registry
from vllm_ascend.ascend_config import init_ascend_config
from vllm_ascend.quantization import modelslim_config  # noqa: F401  registers the method "ascend"
from vllm_ascend.quantization.methods import w8a8_dynamic

registry._run_in_subprocess = lambda function: function()
registry._LazyRegisteredModel._load_modelinfo_from_cache = lambda *_: None
registry._LazyRegisteredModel._save_modelinfo_to_cache = lambda *_: None
w8a8_dynamic.get_mc2_group = lambda: None


def load(folder: Path) -> torch.nn.Module:
    """Build the model of a checkpoint, poison its parameters (-128 or NaN), and load it."""
    config: VllmConfig = EngineArgs(
        str(folder), dtype="bfloat16", load_format="safetensors", max_model_len=64, enforce_eager=True,
        skip_tokenizer_init=True, use_tqdm_on_load=False, quantization="ascend",
    ).create_engine_config()  # fmt: skip
    default = torch.get_default_dtype()
    with set_current_vllm_config(config):
        if parallel_state._TP is None:
            init_distributed_environment(1, 0, f"file:///tmp/vllm-ascend-rendezvous-{os.getpid()}", 0, "gloo")
            initialize_model_parallel(1, 1)
        init_ascend_config(config)
        torch.set_default_dtype(torch.bfloat16)
        try:
            model: torch.nn.Module = initialize_model(config)
            for parameter in model.parameters():
                parameter.data.fill_(float("nan") if parameter.is_floating_point() else -128)
            get_model_loader(config.load_config).load_weights(model, config.model_config)
        finally:
            torch.set_default_dtype(default)
    return model
