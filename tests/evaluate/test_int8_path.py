"""The INT8 path: each module against float64, which holds every product and sum of codes exactly."""

from __future__ import annotations

import pytest
import torch

from quarkconv.evaluate.int8 import Int8Experts, Int8GroupedLinear, Int8Linear, linear_groups
from quarkconv.evaluate.int8_product import int8_product
from quarkconv.experts.function import ExpertActivation
from quarkconv.load.experts import FusedExperts
from quarkconv.verify.reference import reference_forwards


def codes(*shape: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-127, 128, shape, generator=generator, dtype=torch.int8)


@pytest.mark.parametrize(("rows", "inner", "outer"), [(1, 64, 32), (40, 64, 32), (5, 60, 32), (17, 64, 30), (3, 7, 5)])
def test_sums_are_exact(rows: int, inner: int, outer: int) -> None:
    left, right = codes(rows, inner), codes(outer, inner, seed=1)
    expected = (left.double() @ right.double().T).long()
    assert torch.equal(int8_product(left, right).long(), expected)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_equals_float64(static: bool, bias: bool) -> None:
    torch.manual_seed(5)
    weight, scale = codes(24, 64), torch.rand(24) * 0.01 + 1e-4
    added = torch.randn(24).bfloat16() if bias else None
    input_scale = torch.tensor(0.02) if static else None
    states = torch.randn(2, 9, 64).bfloat16()
    found = Int8Linear(weight, scale, added, input_scale)(states)
    wide = states.double()
    step = torch.tensor(0.02).double() if static else (wide.float().abs().amax(-1, keepdim=True) / 127).double()
    # Codes by division in float32, as quantize_int8 defines them: many quotients of bfloat16 values are ties.
    rounded = (wide.float() / step.float()).round().clamp(-127, 127).double()
    expected = (rounded @ weight.double().T) * step * scale.double() + (0 if added is None else added.double())
    # Sums are exact. Two products and a sum in float32 lose 2^-22 of the largest term, and rounding to bfloat16 half a
    # step, at most 2^-8 of the value.
    terms = expected.abs() + (0 if added is None else 2 * added.double().abs())
    error = (found.double() - expected).abs()
    assert found.dtype == torch.bfloat16
    assert bool((error <= expected.abs() * 2.0**-8 + terms * 2.0**-21).all())


def test_grouped_linears_are_linears_of_their_own_inputs() -> None:
    from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4GroupedLinear

    weight, scale = codes(3 * 16, 64), torch.rand(3 * 16) * 0.01
    parts = [Int8Linear(*part, None, None) for part in zip(weight.chunk(3), scale.chunk(3), strict=True)]
    states = torch.randn(2, 9, 3, 64).bfloat16()
    found = Int8GroupedLinear(parts)(states)
    assert all(torch.equal(found[:, :, group], part(states[:, :, group])) for group, part in enumerate(parts))
    module = DeepseekV4GroupedLinear(64, 48, 3)
    module.weight.data = (weight.double() * scale.double()[:, None]).bfloat16()
    expected = module.bfloat16()(states)
    assert linear_groups(module) == 3
    assert found.shape == expected.shape
    assert (found.double() - expected.double()).norm() / expected.double().norm() < 0.02  # rounding to 8 bits: 0.9 %


def test_a_router_is_not_taken_for_a_linear() -> None:
    """It is a subclass of one, and returns weights and experts."""
    from transformers import PhimoeConfig
    from transformers.models.phimoe.modeling_phimoe import PhimoeTopKRouter

    router = PhimoeTopKRouter(PhimoeConfig(hidden_size=8, intermediate_size=8, num_local_experts=4))
    assert isinstance(router, torch.nn.Linear)
    assert linear_groups(router) == 0
    assert linear_groups(torch.nn.Linear(8, 8)) == 1


def test_experts_equal_the_exact_reference() -> None:
    experts, hidden, inner, k = 4, 64, 32, 2
    fused = FusedExperts(
        layer=0,
        module="experts",
        w13=codes(experts, 2 * inner, hidden),
        w13_scale=torch.rand(experts, 2 * inner, 1) * 0.01,
        w2=codes(experts, hidden, inner, seed=3),
        w2_scale=torch.rand(experts, hidden, 1) * 0.01,
    )
    states = torch.randn(10, hidden).bfloat16()
    weights = torch.rand(10, k)
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(10)])
    activation = ExpertActivation("silu")
    found = Int8Experts(fused, activation)(states, ids, weights)
    exact = reference_forwards(states, weights, ids, fused.projection, activation).exact
    error = (found.double() - exact).norm() / exact.norm()
    assert error < 2.0**-8  # both round at the same places, to bfloat16 once
