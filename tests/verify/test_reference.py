"""The references against a few lines of plain arithmetic."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch

from quarkconv.experts.function import ExpertActivation
from quarkconv.load.experts import Projection
from quarkconv.verify.reference import References, quantize, reference_forwards

E, H, I = 3, 24, 10  # noqa: E741


MakeExperts = Callable[..., dict[tuple[str, int], Projection]]
"""Static input scale, None by default -> projections by role and expert."""


@pytest.fixture
def experts() -> MakeExperts:
    generator = torch.Generator().manual_seed(5)

    def projection(out: int, inner: int, static: torch.Tensor | None) -> Projection:
        codes = torch.randint(-127, 128, (out, inner), generator=generator, dtype=torch.int8)
        return Projection(codes, torch.rand(out, generator=generator) * 0.01 + 1e-3, static)

    def make(static: torch.Tensor | None = None) -> dict[tuple[str, int], Projection]:
        roles = {"gate": (I, H), "up": (I, H), "down": (H, I)}
        return {(role, n): projection(*roles[role], static) for role in roles for n in range(E)}

    return make


def inputs(tokens: int = 7, dtype: torch.dtype = torch.bfloat16) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(6)
    states = torch.randn(tokens, H, generator=generator).to(dtype)
    ids = torch.rand(tokens, E, generator=generator).topk(2).indices
    weights = torch.rand(tokens, 2, generator=generator)
    return states, weights, ids


def silu_references(
    states: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor, projections: dict[tuple[str, int], Projection]
) -> References:
    return reference_forwards(
        states, weights, ids, lambda role, number: projections[role, number], ExpertActivation("silu")
    )


def silu(x: float) -> float:
    return x / (1 + math.exp(-x))


@pytest.mark.parametrize(
    ("row", "codes", "scale"),
    [
        ([127.0, -127.0, 0.5, 1.5, 2.5, -0.5], [127, -127, 0, 2, 2, 0], 1.0),  # halves go to the even code
        ([0.0, 0.0], [0, 0], None),
        ([2.54, -1.0, 0.01], [127, -50, 0], 0.02),
    ],
)
def test_a_row_has_the_codes_computed_by_hand(row: list[float], codes: list[int], scale: float | None) -> None:
    found, found_scale = quantize(torch.tensor([row]), None)
    assert found[0].tolist() == codes
    if scale is not None:
        assert found_scale.item() == pytest.approx(scale, rel=1e-6)


def test_static_scale_cuts_off() -> None:
    found, scale = quantize(torch.tensor([[1.0, 300.0, -300.0]]), torch.tensor(1.0))
    assert found[0].tolist() == [1, 127, -127]
    assert scale.item() == 1.0


def test_the_exact_result_is_integer_arithmetic_with_three_roundings(experts: MakeExperts) -> None:
    projections = experts()
    states, weights, ids = inputs()
    result = silu_references(states, weights, ids, projections).exact.bfloat16()
    for token in range(len(states)):
        total = torch.zeros(H, dtype=torch.float64)
        for slot in range(2):
            x = states[token].float()
            x_scale = x.abs().max() / 127
            x_codes = torch.round(x / x_scale).to(torch.int64)
            n = int(ids[token, slot])
            row = {}
            for role in ("gate", "up"):
                codes, scale = projections[role, n].codes.long(), projections[role, n].scale.double()
                row[role] = (codes * x_codes).sum(1).double() * x_scale.double() * scale
            h = torch.tensor([silu(g) * u for g, u in zip(row["gate"].tolist(), row["up"].tolist(), strict=True)])
            h = (
                torch.tensor(
                    [silu(g) * u for g, u in zip(row["gate"].tolist(), row["up"].tolist(), strict=True)],
                    dtype=torch.float64,
                )
                .bfloat16()
                .float()
            )
            h_scale = h.abs().max() / 127
            h_codes = torch.round(h / h_scale).to(torch.int64)
            down = projections["down", n]
            y = (down.codes.long() * h_codes).sum(1).double() * h_scale.double() * down.scale.double()
            total += weights[token, slot].double() * y.bfloat16().double()
        assert torch.equal(result[token], total.bfloat16())


def test_the_dequantized_result_is_the_float_model(experts: MakeExperts) -> None:
    projections = experts()
    states, weights, ids = inputs()
    result = silu_references(states, weights, ids, projections).dequantized

    def weight(role: str, n: int) -> torch.Tensor:
        return projections[role, n].codes.double() * projections[role, n].scale.double()[:, None]

    for token in range(len(states)):
        expected = torch.zeros(H, dtype=torch.float64)
        for slot in range(2):
            n, x = int(ids[token, slot]), states[token].double()
            gate, up = weight("gate", n) @ x, weight("up", n) @ x
            expected += weights[token, slot].double() * (weight("down", n) @ (torch.nn.functional.silu(gate) * up))
        torch.testing.assert_close(result[token], expected, rtol=1e-12, atol=1e-12)


def test_static_scales_cut_the_float_model_off_too(experts: MakeExperts) -> None:
    projections = experts(torch.tensor(0.001))
    states, weights, ids = inputs()
    result = silu_references(states, weights, ids, projections).dequantized
    small = silu_references(states.float().clamp(-0.127, 0.127).to(states.dtype), weights, ids, projections).dequantized
    torch.testing.assert_close(result, small, rtol=2e-2, atol=1e-3)  # bfloat16 rounds 0.127
