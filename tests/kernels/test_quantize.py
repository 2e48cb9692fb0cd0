"""Quantization, bit for bit: against arithmetic in plain Python, and kernels against torch twins."""

import math
import struct
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch

from quarkconv.kernels import quantize_int8, quantize_int8_reference
from quarkconv.kernels.launch.quantize import MIN_SCALE, quantize_rows, quantize_rows_reference

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
IMPLEMENTATIONS = (quantize_int8, quantize_int8_reference)


def f32(value: float) -> float:
    return float(struct.unpack("f", struct.pack("f", value))[0])


def divide(a: float, b: float) -> float:
    """Float32 division of float32 numbers. Double precision has more than twice the bits, so that rounding its
    quotient once more gives what rounding the exact quotient would."""
    return f32(a / b)


def oracle_row(values: list[float], scale: float | None = None) -> tuple[list[int], float]:
    if scale is None:
        scale = max(divide(max(abs(v) for v in values), 127.0), MIN_SCALE)
    return [round(min(max(divide(v, scale), -127.0), 127.0)) for v in values], scale


def spread(rows: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Rows of very different magnitudes, outliers included."""
    g = torch.Generator().manual_seed(rows * 10007 + width)
    x = torch.randn(rows, width, generator=g) * torch.logspace(-4, 3, rows).unsqueeze(-1)
    x[:, ::7] *= 5
    return x.to(dtype).to(device)


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (7, 5), (3, 88), (4, 129), (2, 2100)])
def test_per_token_equals_exact_arithmetic(
    quantize: Callable[..., Any], dtype: torch.dtype, rows: int, width: int, device: torch.device
) -> None:
    x = spread(rows, width, dtype, device)
    codes, scales = quantize(x)
    assert codes.dtype == torch.int8
    assert scales.dtype == torch.float32
    assert codes.shape == x.shape
    assert scales.shape == (rows, 1)
    expected = [oracle_row(row) for row in x.float().tolist()]
    assert codes.tolist() == [row for row, _ in expected]
    assert scales.flatten().tolist() == [scale for _, scale in expected]


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("static", [False, True])
def test_per_tensor_equals_exact_arithmetic(
    quantize: Callable[..., Any], dtype: torch.dtype, static: bool, device: torch.device
) -> None:
    x = spread(3, 3000, dtype, device).view(3, 2, 1500)
    static_scale = torch.tensor([0.37], device=device) if static else None
    codes, scale = quantize(x, granularity="per_tensor", scale=static_scale)
    expected, expected_scale = oracle_row(x.float().flatten().tolist(), f32(0.37) if static else None)
    assert codes.flatten().tolist() == expected
    assert scale.shape == (1,)
    assert scale.item() == expected_scale


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
def test_ties_go_to_even(quantize: Callable[..., Any], device: torch.device) -> None:
    values = [127.0, 0.5, 1.5, 2.5, 3.5, -0.5, -1.5, -2.5, 125.5, 126.5, -126.5]
    codes, scales = quantize(torch.tensor([values], device=device))
    assert scales.item() == 1.0
    assert codes.tolist() == [[127, 0, 2, 2, 4, 0, -2, -2, 126, 126, -126]]


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_zeros_give_zero_codes_and_a_positive_scale(
    quantize: Callable[..., Any], granularity: Literal["per_token", "per_tensor"], device: torch.device
) -> None:
    codes, scales = quantize(torch.zeros(3, 96, dtype=torch.bfloat16, device=device), granularity=granularity)
    assert not codes.any()
    assert (scales == MIN_SCALE).all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
def test_values_too_small_for_a_normal_scale_follow_the_definition(
    quantize: Callable[..., Any], device: torch.device
) -> None:
    x = torch.tensor([[1e-40, -1e-40], [1e-30, 2e-30], [1e-27, -3e-27]], device=device)
    codes, scales = quantize(x)
    assert codes.tolist() == [oracle_row(row)[0] for row in x.tolist()]
    assert codes[0].tolist() == [0, 0]
    assert codes[2].tolist() == [42, -127]
    assert torch.isfinite(scales).all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("width", [96, 2100])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_that_is_not_finite_keeps_to_itself(
    quantize: Callable[..., Any], bad: float, width: int, device: torch.device
) -> None:
    x = spread(3, width, torch.bfloat16, device)
    codes, scales = quantize(x)
    x[1, width - 3] = bad
    spoiled_codes, spoiled_scales = quantize(x)
    assert not spoiled_codes[1].any()
    assert spoiled_scales[1].isnan().all()
    for row in (0, 2):
        assert torch.equal(spoiled_codes[row], codes[row])
        assert torch.equal(spoiled_scales[row], scales[row])


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_one_scale_for_all_saturates_infinities_and_drops_nans(
    quantize: Callable[..., Any], static: bool, device: torch.device
) -> None:
    x = torch.tensor([[1.0, math.nan, -127.0], [math.inf, -math.inf, 63.0]], device=device)
    scale = torch.ones(1, device=device) if static else None
    codes, found = quantize(x, granularity="per_tensor", scale=scale)
    assert codes.tolist() == [[1, 0, -127], [127, -127, 63]]
    assert found.tolist() == [1.0]


@pytest.mark.filterwarnings("ignore:overflow:RuntimeWarning")
def test_static_scale_saturates(device: torch.device) -> None:
    x = torch.tensor([[1e6, -1e6, 300.0, 1e38]], device=device)
    for quantize in IMPLEMENTATIONS:
        codes, _ = quantize(x, granularity="per_tensor", scale=torch.tensor(1e-3, device=device))
        assert codes.tolist() == [[127, -127, 127, 127]]


@pytest.mark.parametrize("granularity", ["per_token", "per_tensor"])
def test_kernel_and_twin_agree_on_many_values(
    granularity: Literal["per_token", "per_tensor"], device: torch.device
) -> None:
    x = spread(64, 1024, torch.bfloat16, device)
    codes, scales = quantize_int8(x, granularity=granularity)
    twin_codes, twin_scales = quantize_int8_reference(x, granularity=granularity)
    assert torch.equal(codes, twin_codes)
    assert torch.equal(scales, twin_scales)
    # Half a step, and the rounding of the quotient, which is at most 127 * 2^-24 of a step.
    assert ((codes * scales - x.float()).abs() <= scales * (0.5 + 2**-16)).all()


def test_every_layout_is_quantized(device: torch.device) -> None:
    x = spread(6, 40, torch.bfloat16, device).view(2, 3, 40)
    codes, scales = quantize_int8(x.transpose(0, 1))
    assert torch.equal(codes, quantize_int8(x)[0].transpose(0, 1))
    assert scales.shape == (3, 2, 1)
    for shape in ((0, 8), (3, 0), (2, 0, 8)):
        codes, scales = quantize_int8(torch.empty(shape, dtype=torch.float16, device=device))
        assert codes.shape == shape
        assert scales.shape == (*shape[:-1], 1)


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("pairs_per_row", [1, 3])
def test_rows_of_pairs_equal_the_twin(static: bool, weighted: bool, pairs_per_row: int, device: torch.device) -> None:
    """The form that the forward uses: expert scales, skipped pairs, router weights, a token for several pairs."""
    rows, width, experts = 4, 96, 3
    x = spread(rows, width, torch.bfloat16, device)
    pairs = rows * pairs_per_row
    ids = (torch.arange(pairs, device=device) % (experts + 2) - 1).to(torch.int32)  # -1 and `experts` occur
    options: dict[str, Any] = {
        "topk_ids": ids,
        "num_experts": experts,
        "expert_scale": torch.tensor([0.01, 0.5, 3.0], device=device) if static else None,
        "router_weight": torch.linspace(0.1, 1.5, pairs, device=device) if weighted else None,
        "pairs_per_row": pairs_per_row,
    }
    codes = torch.full((pairs, width), 99, dtype=torch.int8, device=device)
    scales = torch.full((pairs,), -1.0, device=device)
    quantize_rows(x, codes=codes, scales=scales, **options)
    twin_codes, twin_scales = quantize_rows_reference(x, **options)
    here = (ids >= 0) & (ids < experts)
    assert torch.equal(codes[here], twin_codes[here])
    assert torch.equal(scales[here], twin_scales[here])
    assert (codes[~here] == 99).all()
    assert (scales[~here] == -1).all()


@pytest.mark.parametrize("quantize", IMPLEMENTATIONS)
def test_wrong_arguments_are_refused(quantize: Callable[..., Any], device: torch.device) -> None:
    x = torch.ones(2, 4, device=device)
    one = torch.ones(1, device=device)
    with pytest.raises(TypeError, match="x: expected bfloat16, float16 or float32, found"):
        quantize(x.to(torch.int8))
    with pytest.raises(ValueError, match="at least one dimension"):
        quantize(x[0, 0])
    with pytest.raises(ValueError, match="granularity: expected"):
        quantize(x, granularity="per_channel")
    with pytest.raises(ValueError, match="expected None for granularity 'per_token'"):
        quantize(x, scale=one)
    with pytest.raises(TypeError, match="scale: expected float32"):
        quantize(x, granularity="per_tensor", scale=one.half())
    with pytest.raises(ValueError, match="scale: expected one element"):
        quantize(x, granularity="per_tensor", scale=torch.ones(2, device=device))
    with pytest.raises(ValueError, match="scale: expected device"):
        quantize(x, granularity="per_tensor", scale=one.to("meta"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_one_refining_step_is_enough_for_values_of_16_bits(dtype: torch.dtype) -> None:
    """The steps of `_to_own_codes` through float64, where products of float32 are exact; `test_gpu` runs the kernel."""
    values = torch.arange(0x7C00, dtype=torch.int32).to(torch.int16).view(dtype).float()
    below = values[(values >= 2**-9) & (values < 2)]
    for largest in below[below >= 1]:
        x, scale = below[below <= largest], largest / 127
        inverse = 1 / scale
        quotient = x * inverse
        rest = (x.double() - quotient.double() * scale.double()).float()
        refined = (rest.double() * inverse.double() + quotient.double()).float()
        assert torch.equal(refined.round(), (x / scale).round())
