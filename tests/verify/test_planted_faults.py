"""Faults planted in single experts are found: beside the source always, by numbers alone where a forward notices them.

Six seeds here; ``pytest tests/verify/test_planted_faults.py --seeds 200`` takes as many as you like.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest
import torch
from support.exports import DATA, int8_families

import quarkconv
from quarkconv.description.description import describe
from quarkconv.experts.function import ExpertActivation
from quarkconv.experts.knowledge import expert_activation
from quarkconv.kernels import fused_experts_int8
from quarkconv.load.experts import FusedExperts
from quarkconv.load.layer_reader import LayerReader
from quarkconv.verify import numbers
from quarkconv.verify.layer import _source_problems
from quarkconv.verify.numbers import CheckedLayer, compute_numbers
from quarkconv.verify.router import router_of

FAMILIES: Final = DATA / "families"
NAMES: Final = int8_families()
COMPUTED: Final = ("mixtral-0.13-f2f", "gpt_oss-0.13-eager", "deepseek_v4-0.13-f2f", "gemma4-0.13-f2f")


def shifted_scale(experts: FusedExperts, seed: int) -> FusedExperts:
    """The scales of one expert, shifted by a row, in one of the two tensors."""
    expert, name = seed % experts.experts, ("w13_scale", "w2_scale")[seed % 2]
    scale = getattr(experts, name).clone()
    scale[expert] = scale[expert].roll(1, 0)
    return dataclasses.replace(experts, **{name: scale})


def flipped_code(experts: FusedExperts, seed: int) -> FusedExperts:
    """One bit of one code."""
    random = torch.Generator().manual_seed(seed)
    name = ("w13", "w2")[seed % 2]
    codes = getattr(experts, name).clone()
    place = int(torch.randint(codes.numel(), (1,), generator=random))
    codes.view(torch.uint8).view(-1)[place] ^= 1 << int(torch.randint(8, (1,), generator=random))
    return dataclasses.replace(experts, **{name: codes})


def exchanged_halves(experts: FusedExperts, seed: int) -> FusedExperts:
    """Gate and up of one expert exchanged, codes and scales."""
    expert, half = seed % experts.experts, experts.intermediate_size
    w13, scale = experts.w13.clone(), experts.w13_scale.clone()
    w13[expert], scale[expert] = w13[expert].roll(half, 0), scale[expert].roll(half, 0)
    return dataclasses.replace(experts, w13=w13, w13_scale=scale)


FAULTS: Final = (shifted_scale, flipped_code, exchanged_halves)


@pytest.mark.parametrize("name", NAMES)
def test_every_fault_of_an_expert_is_found_beside_the_source(name: str, seeds: range) -> None:
    planted = 0
    for layer in describe(FAMILIES / name).int8_layers:
        experts = quarkconv.load_fused_experts(FAMILIES / name, layer.prefix)
        assert list(_source_problems(experts, experts)) == []
        for fault in FAULTS:
            if fault is exchanged_halves and not layer.gated:
                continue
            for seed in seeds:
                problems = list(_source_problems(fault(experts, seed), experts))
                assert problems, (name, layer.prefix, fault.__name__, seed)
                if fault is not flipped_code:
                    assert {problem.tensor.split(" ")[0].rpartition(".")[2] for problem in problems} == {
                        str(seed % layer.experts)
                    }
                planted += 1
    print(f"{name}: {planted} faults planted, all found")


def checked(name: str) -> CheckedLayer:
    description = describe(FAMILIES / name)
    layer = description.int8_layers[-1]
    activation = expert_activation(description.config.raw, layer)
    assert isinstance(activation, ExpertActivation)
    with ThreadPoolExecutor(2) as pool, LayerReader(description, pool) as reader:
        router = router_of(layer, description.config.raw, reader)
    experts = quarkconv.load_fused_experts(FAMILIES / name, layer.prefix)
    return CheckedLayer(layer, experts, activation, description.config.top_k, router)


@pytest.mark.parametrize("fault", [shifted_scale, exchanged_halves])
@pytest.mark.parametrize("name", COMPUTED)
def test_a_forward_with_a_faulty_expert_is_found_by_numbers_alone(
    name: str, fault: Callable[[FusedExperts, int], FusedExperts], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = checked(name)
    for seed in range(4):
        wrong = fault(layer.experts, seed)

        def faulty(states: torch.Tensor, *rest: Any, wrong: FusedExperts = wrong, **options: Any) -> torch.Tensor:
            return fused_experts_int8(
                states, wrong.w13, wrong.w2, wrong.w13_scale, wrong.w2_scale, *rest[4:], **options
            )

        monkeypatch.setattr(numbers, "fused_experts_int8", faulty)
        result, _ = compute_numbers(layer, tokens=64, seed=seed, recorded=None)
        assert not result.exact.ok, (name, fault.__name__, seed)


@pytest.mark.parametrize("key", ["hidden_act", "swiglu_limit", "top_k", "nothing"])
def test_a_config_of_another_function_is_found_beside_the_source(key: str, tmp_path: Path) -> None:
    source = FAMILIES / "minimax_m3_vl-0.13-f2f"
    out = quarkconv.convert_checkpoint(source, "compressed-tensors", tmp_path / "out").output
    config = json.loads((out / "config.json").read_text())
    text = config.get("text_config", config)
    changes = {"hidden_act": "gelu", "swiglu_limit": 3.5, "top_k": 3}
    if key != "nothing":
        text[{"top_k": "num_experts_per_tok"}.get(key, key)] = changes[key]
    (out / "config.json").write_text(json.dumps(config))
    (out / "quarkconv.json").unlink()
    problems = quarkconv.verify_checkpoint(out, source, device="cpu", tokens=4).problems
    expected = {"hidden_act": "activation", "swiglu_limit": "activation", "top_k": "routing"}
    if key == "nothing":
        assert problems == ()
    else:
        assert f"config.json gives the {expected[key]} " in problems[0].message
