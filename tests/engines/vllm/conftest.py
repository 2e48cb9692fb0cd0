"""Exports and what they convert to, made once for all tests with vLLM."""

from __future__ import annotations

from types import SimpleNamespace

import engines.vllm.loading  # noqa: F401  prepares vLLM for a machine without GPU, before any test imports it
import pytest
from engines.forms import Forms
from engines.vllm.exports import prepare
from engines.vllm.plugin_layers import logger_into, workspaces
from support.exports import Checkpoints
from vllm.model_executor.layers import quantization
from vllm.model_executor.layers.fused_moe import modular_kernel

import quarkconv.integrations.vllm as plugin


@pytest.fixture(scope="session")
def forms(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """Checkpoints by export and form."""
    return Forms(checkpoints, tmp_path_factory.mktemp("forms"), prepare)


@pytest.fixture
def turned_on(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The plugin is on, on a platform of CUDA; gives what it logs."""
    from quarkconv.integrations.vllm import experts, method

    lines: list[str] = []
    monkeypatch.setattr(method, "logger", logger_into(lines))
    monkeypatch.setattr(experts, "current_platform", SimpleNamespace(is_cuda_alike=lambda: True, is_xpu=lambda: False))
    monkeypatch.setattr(quantization, "_CUSTOMIZED_METHOD_TO_QUANT_CONFIG", {})
    monkeypatch.setenv(plugin.VARIABLE, "1")
    monkeypatch.setattr(modular_kernel, "current_workspace_manager", lambda: workspaces("cpu"))
    plugin.register()
    return lines
