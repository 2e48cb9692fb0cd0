"""What the plugin hands to the kernels: the ids of a rank's own experts, and vLLM's activations."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import vllm
from engines.expected import RANKS, Rank
from engines.forms import QUARK, Forms
from engines.vllm.loading import build
from engines.vllm.plugin_layers import ready
from vllm.config import set_current_vllm_config
from vllm.model_executor.layers import activation as activations
from vllm.model_executor.layers.fused_moe.activation import MoEActivation

from quarkconv.kernels.activations import activate_reference, make_activation


def test_experts_of_no_rank_are_skipped() -> None:
    from quarkconv.integrations.vllm.experts import local_ids

    ids = torch.tensor([[0, 3], [-1, 2]], dtype=torch.int32)
    mapped = local_ids(ids, torch.tensor([-1, -1, 0, 1], dtype=torch.int32))
    assert mapped.tolist() == [[-1, 1], [-1, 0]]
    assert local_ids(ids, None) is ids


@pytest.mark.parametrize(
    ("expert_map", "first"),
    [
        (None, None),
        ([0, 1, -1, -1], 0),
        ([-1, -1, 0, 1], 2),
        ([-1, 0, 1, -1], 1),
        ([0, -1, 1, -1], None),
        ([-1, 0, -1, 1], None),
        ([1, 0, -1, -1], None),
        ([-1, -1, -1, -1], None),
    ],
)
def test_experts_that_follow_each_other_are_found(expert_map: list[int] | None, first: int | None) -> None:
    from quarkconv.integrations.vllm.experts import first_expert

    assert first_expert(None if expert_map is None else torch.tensor(expert_map, dtype=torch.int32)) == first


@pytest.mark.usefixtures("turned_on")
@pytest.mark.parametrize("rank", RANKS[3:], ids=str)
def test_ids_of_other_ranks_are_outside_of_this_one(forms: Forms, rank: Rank) -> None:
    """By a subtraction as vLLM places experts, and by the map where another map is passed."""
    name = "qwen3_moe-quark0.13-f2f"
    layer = ready(forms(name, QUARK), name, rank)
    experts, own = layer.quant_method.moe_kernel.fused_experts, layer.local_num_experts
    ids = torch.tensor([[*range(-1, layer.global_num_experts)]], dtype=torch.int32)
    for expert_map in (layer.expert_map, layer.expert_map.flip(0)):
        found = experts._local_ids(ids, expert_map)
        assert found.dtype == torch.int32
        expected = [-1, *expert_map.tolist()]
        assert [local if 0 <= local < own else -1 for local in found[0].tolist()] == expected


MAPPED: dict[str, tuple[dict[str, float], Any]] = {
    "silu": ({}, None),
    "silu, limited": ({"swiglu_limit": 0.5}, lambda: activations.SiluAndMulWithClamp(0.5, compile_native=False)),
    "swigluoai_uninterleave": (
        {"swiglu_limit": 0.5, "swiglu_alpha": 1.702, "swiglu_beta": 1.0},
        lambda: activations.SiluAndMulWithClamp(0.5, 1.702, 1.0, compile_native=False),
    ),
    "situ": ({"activation_situ_beta": 1.5}, lambda: activations.SituAndMul(1.5, compile_native=False)),
    "situ, limited": (
        {"activation_situ_beta": 1.5, "activation_situ_linear_beta": 0.7},
        lambda: activations.SituAndMul(1.5, 0.7, compile_native=False),
    ),
    "swiglustep": ({}, lambda: activations.SwigluStepAndMul()),
}
"""Activation -> parameters in vLLM's MoE config, and vLLM's own class of it."""


@pytest.mark.parametrize("name", MAPPED)
def test_activations_are_those_of_vllm(forms: Forms, name: str) -> None:
    from quarkconv.integrations.vllm.experts import activation_arguments

    if name.split(",")[0] not in [each.value for each in MoEActivation]:
        pytest.skip(f"vLLM {vllm.__version__} has no such activation")
    fields, own = MAPPED[name]
    arguments = activation_arguments(MoEActivation(name.split(",")[0]), SimpleNamespace(**fields))
    assert arguments is not None
    values = tuple(arguments.get(key) for key in ("activation_limit", "activation_alpha"))
    x = 4 * torch.randn(64, 64, generator=torch.Generator().manual_seed(0))
    gate, up = x.chunk(2, 1)
    ours = activate_reference(gate, up, make_activation(arguments["activation"], *values))
    if own is None:
        torch.testing.assert_close(ours, torch.nn.functional.silu(gate) * up)
        return
    with set_current_vllm_config(vars(build(forms("qwen3_moe-quark0.13-f2f", QUARK)))["engine_config"]):
        torch.testing.assert_close(ours, own().forward_native(x))
