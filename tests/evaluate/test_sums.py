"""Sums over tokens against float64."""

from __future__ import annotations

import math

import pytest
import torch

from quarkconv.evaluate.sums import DeviceSums, LayerSums, compared


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_errors_of_hidden_states_are_those_of_float64(dtype: torch.dtype) -> None:
    """Norms of rows are computed in float32: 64 roundings of 2^-24 at most."""
    generator = torch.Generator().manual_seed(5)
    base = (torch.randn(2, 30, 64, generator=generator) * 3).to(dtype)
    int8 = (base.double() + 0.01 * torch.randn(base.shape, generator=generator)).to(dtype)
    sums = DeviceSums()
    difference, norm, baseline_norm = compared(int8, base)
    sums.add(difference=difference, norm=norm, baseline_norm=baseline_norm)
    sums.tokens = 60
    found, infinite = sums.take()
    quantized, baseline = int8.double().flatten(), base.double().flatten()
    assert found.drift == pytest.approx(((quantized - baseline).norm() / baseline.norm()).item(), rel=1e-5)
    cosine = (quantized @ baseline / quantized.norm() / baseline.norm()).item()
    assert 1 - found.cosine == pytest.approx(1 - cosine, abs=1e-7)
    assert (found.tokens, infinite) == (60, [])


def test_hidden_states_of_one_model_that_are_not_finite_are_named() -> None:
    sums = DeviceSums()
    sums.check("int8", torch.tensor([1.0, math.nan]))
    sums.check("unquantized", torch.tensor([1.0]))
    assert sums.take()[1] == ["int8"]


def test_equal_hidden_states_have_no_error() -> None:
    assert LayerSums(difference=0.0, norm=4.0, baseline_norm=4.0).drift == 0
    assert LayerSums(difference=0.0, norm=4.0, baseline_norm=4.0).cosine == 1
    assert LayerSums().cosine == 1
