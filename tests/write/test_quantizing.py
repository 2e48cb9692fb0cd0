"""Codes and scales of float rows, against float64 arithmetic that is rounded where the formula rounds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from quarkconv.errors import UnsupportedError
from quarkconv.plan.pieces import Codes, Copy, RowScales
from quarkconv.write.transforms import transformed

DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}


class Memory:
    """A source of one tensor."""

    def __init__(self, weight: torch.Tensor) -> None:
        self.data = weight.contiguous().view(torch.uint8).numpy().tobytes()

    def fill(self, source: Copy, offset: int, view: memoryview) -> None:
        view[:] = self.data[source.start + offset : source.start + offset + len(view)]


def quantized(weight: torch.Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The codes and scales of the pieces of a whole weight."""
    memory = Memory(weight)
    rows = Copy("weight", "file", 0, len(memory.data))
    codes = b"".join(map(bytes, transformed(Codes(rows, dtype, weight.shape[1]), memory)))
    scales = b"".join(map(bytes, transformed(RowScales(rows, dtype, weight.shape[1]), memory)))
    return np.frombuffer(codes, np.int8).reshape(weight.shape), np.frombuffer(scales, np.float32)


def expected(weight: torch.Tensor, dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The same in float64. A quotient by 127.5 is too far from the middle of two values to be rounded twice."""
    values = weight.double().numpy()
    scales = torch.from_numpy(np.abs(values).max(1) / 127.5).to(DTYPES[dtype]).double().numpy()
    factors = (1 / scales).astype(np.float32).astype(np.float64)
    products = (values * factors[:, None]).astype(np.float32)
    return np.clip(np.rint(products), -128, 127).astype(np.int8), scales.astype(np.float32)


def peaks(dtype: str) -> torch.Tensor:
    """Every 16-bit value that a row with a normal scale can have as its largest; in F32 some of each exponent."""
    if dtype == "F32":
        bits = torch.arange(2**23, 0x7F800000, 99_991, dtype=torch.int32)
        values = bits.view(torch.float32)
        return values[values > 1e-35]
    values = torch.arange(0x7FFF, dtype=torch.int16).view(DTYPES[dtype])
    least = 1e-35 if dtype == "BF16" else 127.5 * 2**-14
    return values[values.isfinite() & (values > least)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sign", [1, -1])
def test_codes_and_scales_of_every_largest_value_are_those_of_float64(dtype: str, sign: int) -> None:
    largest = peaks(dtype)
    generator = torch.Generator().manual_seed(1)
    shares = torch.rand(len(largest), 7, generator=generator) * 2 - 1
    weight = torch.cat([sign * largest[:, None], (largest[:, None].float() * shares).to(largest.dtype)], 1)
    found, reference = quantized(weight, dtype), expected(weight, dtype)
    assert len(weight) > 10_000
    assert np.array_equal(found[1], reference[1])
    assert np.array_equal(found[0], reference[0])
    assert found[0].max() == 127
    assert sign > 0 or found[0].min() == -128


@pytest.mark.parametrize("shape", [(1, 1), (3, 7), (65, 2048), (129, 2049), (2, 200_000)])
def test_weights_of_any_shape_are_quantized(shape: tuple[int, int]) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2)).bfloat16()
    found, reference = quantized(weight, "BF16"), expected(weight, "BF16")
    assert np.array_equal(found[0], reference[0])
    assert np.array_equal(found[1], reference[1])


def test_a_weight_without_rows_has_no_codes() -> None:
    codes, scales = quantized(torch.empty(0, 8, dtype=torch.bfloat16), "BF16")
    assert codes.size == scales.size == 0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("row", [0, 130, 199])
def test_a_row_that_is_not_finite_is_named(dtype: str, value: float, row: int) -> None:
    weight = torch.ones(200, 1000, dtype=DTYPES[dtype])
    weight[row, 999] = value
    with pytest.raises(UnsupportedError) as caught:
        quantized(weight, dtype)
    assert f"row {row} " in str(caught.value)


def test_rows_of_one_weight_do_not_reach_the_next_one_of_its_shape() -> None:
    """Weights of a shape share memory, and the last block of a weight is not full."""
    weight = torch.randn(200, 1000, generator=torch.Generator().manual_seed(3)).bfloat16()
    damaged = weight.clone()
    damaged[199] = float("nan")
    with pytest.raises(UnsupportedError):
        quantized(damaged, "BF16")
    assert np.array_equal(quantized(weight, "BF16")[0], expected(weight, "BF16")[0])
