"""Layers of routed experts in vLLM's classes, ready to compute on the CPU, and what they compute in float64."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from engines.expected import WHOLE, Rank, Stacked
from engines.forward import exact_experts
from engines.vllm.loading import build, load
from vllm.config import set_current_vllm_config

EXPERTS = "model.layers.1.{}.experts"
MOE = {"mixtral-quark0.11-eager": "block_sparse_moe", "minimax_m2-quark0.13-f2f": "block_sparse_moe"}
TOKENS, TOP_K = 24, 2


def logger_into(lines: list[str]) -> Any:
    """A logger that formats into `lines`, with arguments that vLLM's `_once` can hash."""

    def log(text: str, *arguments: Any) -> None:
        hash(arguments)
        lines.append(text % arguments)

    return SimpleNamespace(info_once=log, warning_once=log)


def workspaces(device: str) -> Any:
    """vLLM's workspaces on a device: its own are on the accelerator in some releases."""

    def get_simultaneous(*shapes: Any) -> list[torch.Tensor]:
        return [torch.empty(size, dtype=dtype, device=device) for size, dtype in shapes]

    return SimpleNamespace(get_simultaneous=get_simultaneous)


def experts_of(model: torch.nn.Module, name: str) -> Any:
    """vLLM's layer of the routed experts of layer 1."""
    return model.get_submodule(f"{EXPERTS.format(MOE.get(name, 'mlp'))}.routed_experts")


def ready(folder: Path, name: str, rank: Rank = WHOLE) -> Any:
    """The experts of layer 1, loaded and with their kernel; zero points that are not stored are 0, as in vLLM."""
    model = build(folder, rank)
    for key, parameter in model.named_parameters():
        if key.endswith("_zero_point"):
            parameter.data.zero_()
    load(model, rank)
    layer = experts_of(model, name)
    with set_current_vllm_config(vars(model)["engine_config"]):
        layer.quant_method.process_weights_after_loading(layer)
    return layer


def inputs(layer: Any, experts: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens in bf16, and the weights and ids of their experts."""
    random = torch.Generator().manual_seed(1)
    x = torch.randn(TOKENS, layer.w13_weight.shape[2], generator=random).bfloat16()
    ids = torch.stack([torch.randperm(experts, generator=random)[:TOP_K] for _ in range(TOKENS)])
    return x, torch.rand(TOKENS, TOP_K, generator=random), ids.int()


def exact(
    stacked: Stacked, name: str, x: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, slices: int = 1
) -> torch.Tensor:
    """The experts of layer 1 in float64."""
    layer = f"{EXPERTS.format(MOE.get(name, 'mlp'))}.routed_experts"
    return exact_experts(stacked, layer, x, weights, ids, static="static" in name, slices=slices)


BOUND = 2.0**-8
"""Of the error over the norm: y and the sum are rounded to bf16, each by at most 2^-9 of a value."""
