"""Routed experts in floats, whole and in groups, against transformers' forward; norms by what classes compute."""

from __future__ import annotations

from pathlib import Path
from types import MethodType
from typing import Any

import pytest
import torch
import transformers
from support.exports import DATA, restore
from torch import Tensor, nn

from quarkconv.evaluate.float_experts import FloatExperts, computes_grouped
from quarkconv.evaluate.norms import _eps, _is_rms_norm
from quarkconv.evaluate.skeleton import Skeleton

FAMILIES = {path.name: path for path in sorted((DATA / "families").iterdir()) if path.is_dir()}
NOT_IN_5_17 = ("bailing_hybrid-", "dbrx-", "deepseek_v32-", "glm5_next-", "glm_moe_dsa-", "qwen4_exp-")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=list(FAMILIES))
def skeleton(request: pytest.FixtureRequest, tmp_path: Path) -> Skeleton:
    if request.param.startswith(NOT_IN_5_17) and transformers.__version__.startswith("5.17."):
        pytest.skip("transformers 5.17 does not read this config.json; 5.24 does")
    return Skeleton(restore(FAMILIES[request.param], tmp_path / "model"), torch.device("cpu"))


def experts_of(skeleton: Skeleton) -> list[Any]:
    found = [skeleton.experts_of(number).values() for number in range(len(skeleton.layers))]
    return [module for modules in found for module in modules if computes_grouped(module)]


@pytest.mark.parametrize("group", [None, 1, 3])
@pytest.mark.parametrize("device", DEVICES)
def test_experts_have_the_bits_of_transformers(skeleton: Skeleton, group: int | None, device: str) -> None:
    generator = torch.Generator().manual_seed(5)
    for module in experts_of(skeleton)[:1]:
        module.forward = MethodType(type(module).forward, module)
        filled = nn.ParameterDict()
        for name, item in module.named_parameters(recurse=False):
            value = torch.randn(item.shape, generator=generator) / item.shape[-1] ** 0.5
            filled[name] = nn.Parameter(value.to(device, item.dtype), requires_grad=False)
        module._parameters.update(filled)
        hidden = module.up_proj if hasattr(module, "up_proj") else module.gate_up_proj
        width = hidden.shape[1] if module.is_transposed else hidden.shape[2]
        states = torch.randn(9, width, generator=generator).to(device, hidden.dtype)
        scores = torch.rand(9, module.num_experts, generator=generator)
        weights, ids = (item.to(device) for item in scores.topk(min(2, module.num_experts)))
        for dtype in (torch.float32, hidden.dtype):
            with torch.no_grad():
                expected = module(states, ids, weights.to(dtype))
                found = FloatExperts(module, group)(states, ids, weights.to(dtype))
            assert torch.equal(found, expected)


def test_norms_are_told_apart_by_what_they_compute() -> None:
    class Norm(nn.Module):
        def __init__(self, one: float, early: bool) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.ones(96))
            self.variance_epsilon = 1e-5
            self.one, self.early = one, early

        def forward(self, states: Tensor) -> Tensor:
            wide = states.float()
            wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
            weight = self.weight + self.one
            return (weight.float() * wide).to(states.dtype) if self.early else weight * wide.to(states.dtype)

    for one, early, expected in ((0.0, False, True), (1.0, False, False), (0.0, True, False)):
        assert _is_rms_norm(Norm(one, early), 1e-5) is expected
    assert not _is_rms_norm(Norm(0.0, False), 1e-4)


def test_norms_of_most_families_run_in_one_kernel(skeleton: Skeleton) -> None:
    """Of those that add one to the weight, or take it in float32, none does."""
    norms = [module for module in skeleton.model.modules() if _eps(module) is not None]
    kinds = {type(module).__name__: _is_rms_norm(module, _eps(module) or 0.0) for module in norms}
    plain = ("Qwen2Moe", "Qwen3Moe", "Mixtral", "DeepseekV3", "Glm4Moe", "Olmoe", "MiniMaxM2", "Ernie4_5", "HunYuan")
    others = ("Gemma4", "GptOss", "Qwen3_5", "Qwen3Next")
    for name, found in kinds.items():
        assert found or not name.startswith(plain)
        assert not (found and name.startswith(others))
