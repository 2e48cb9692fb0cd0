"""The grouped products: integer sums bit for bit, float epilogues against float64."""

from typing import Any

import pytest
import torch

from quarkconv.kernels.activations import ACTIVATIONS, activate_reference, make_activation
from quarkconv.kernels.arguments import ExpertWeights, RoutingPlan
from quarkconv.kernels.launch.grouped_gemm import (
    grouped_down,
    grouped_down_reference,
    grouped_gate_up,
    grouped_gate_up_reference,
    int8_matmul_reference,
)
from quarkconv.kernels.launch.routing import empty_plan, route_pairs
from quarkconv.kernels.tables import RowBlocks, TileOptions

pytestmark = pytest.mark.long(20)

TILE = TileOptions(block_n=32, block_k=64, group_m=2, num_warps=4, num_stages=2)
WIDE = TileOptions(block_n=64, block_k=32, group_m=1, num_warps=4, num_stages=3)
UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11, torch.float32: 2.0**-24}

# D, N: multiples of the tile; less than one; one and a bit; real odd sizes.
SIZES = [(128, 64), (24, 8), (80, 96), (176, 88)]


def random_codes(g: torch.Generator, shape: tuple[int, ...], device: torch.device | str) -> torch.Tensor:
    return torch.randint(-128, 128, shape, generator=g, dtype=torch.int8).to(device)


def inputs(
    depth: int,
    columns: int,
    device: torch.device,
    *,
    tokens: int = 9,
    top_k: int = 2,
    experts: int = 4,
    per_tensor: bool = False,
    bias: torch.dtype | None = None,
) -> tuple[torch.Tensor, torch.Tensor, ExpertWeights, torch.Tensor]:
    """(codes, row_scale, gate-up-shaped weights [E, columns, depth], ids with an empty expert and skipped pairs)."""
    g = torch.Generator().manual_seed(depth + columns)
    ids = torch.randint(0, experts - 1, (tokens, top_k), generator=g)  # the last expert gets nothing
    ids[1, 0] = -1
    ids[-1, -1] = experts
    scale_rows = 1 if per_tensor else columns
    weights = ExpertWeights(
        codes=random_codes(g, (experts, columns, depth), device),
        scale=(0.5 + torch.rand(experts, scale_rows, 1, generator=g)).to(device) / (74 * depth**0.5),
        bias=None if bias is None else torch.randn(experts, columns, generator=g).to(bias).to(device),
    )
    row_scale = (0.5 + torch.rand(tokens * top_k, generator=g)).to(device) / 40
    return random_codes(g, (tokens * top_k, depth), device), row_scale, weights, ids.to(torch.int32).to(device)


# One height; a tail; a tail of the same height and short blocks.
CUTS = [RowBlocks(16), RowBlocks(16, 16), RowBlocks(32, 32, 16)]
CUTS_AND_TILES = list(zip(CUTS, (TILE, WIDE, TILE), strict=True))


def plan_for(ids: torch.Tensor, experts: int, blocks: RowBlocks = CUTS[0]) -> RoutingPlan:
    return route_pairs(ids, experts, empty_plan(ids.numel(), experts, blocks, ids.device))


def sort_rows(plan: RoutingPlan, rows: torch.Tensor) -> torch.Tensor:
    """Rows of pairs, [P, ...], in the row order of the plan."""
    order = plan.pairs[: plan.totals[1]].long()
    return torch.cat([rows[order], rows[: len(rows) - len(order)]])


def unsort_rows(plan: RoutingPlan, rows: torch.Tensor, rest: float) -> torch.Tensor:
    """The reverse; pairs that the plan leaves out get `rest`, which the rows beyond its own must still hold."""
    used = plan.totals[1].item()
    expected = torch.full_like(rows[used:], rest)
    assert torch.equal(rows[used:].nan_to_num(nan=-99), expected.nan_to_num(nan=-99))
    out = torch.full_like(rows, rest)
    out[plan.pairs[:used].long()] = rows[:used]
    return out


def here(ids: torch.Tensor, experts: int) -> torch.Tensor:
    return ((ids >= 0) & (ids < experts)).flatten()


def exact_sums(codes: torch.Tensor, weights: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """int64 sums on the CPU, with the sums of skipped pairs 0."""
    codes, w, numbers = codes.cpu().long(), weights.cpu().long(), ids.flatten().tolist()
    zero = torch.zeros(w.shape[1], dtype=torch.long)
    return torch.stack([w[e] @ codes[p] if 0 <= e < len(w) else zero for p, e in enumerate(numbers)])


@pytest.mark.parametrize(("depth", "columns"), SIZES)
@pytest.mark.parametrize(("blocks", "tile"), CUTS_AND_TILES, ids=str)
def test_down_sums_are_exact(
    depth: int, columns: int, tile: TileOptions, blocks: RowBlocks, device: torch.device
) -> None:
    codes, row_scale, weights, ids = inputs(depth, columns, device, tokens=24)
    out = torch.full((codes.shape[0], columns), -7, dtype=torch.int32, device=device)
    plan = plan_for(ids, 4, blocks)
    grouped_down(sort_rows(plan, codes), sort_rows(plan, row_scale), weights, plan, out, tile)
    rows = here(ids, 4)
    assert torch.equal(out[rows].cpu().long(), exact_sums(codes, weights.codes, ids)[rows.cpu()])
    assert (out[~rows] == -7).all()


@pytest.mark.parametrize(("depth", "columns"), SIZES)
@pytest.mark.parametrize(("blocks", "tile"), CUTS_AND_TILES, ids=str)
def test_gate_up_sums_are_exact(
    depth: int, columns: int, tile: TileOptions, blocks: RowBlocks, device: torch.device
) -> None:
    _, row_scale, weights, ids = inputs(depth, 2 * columns, device, tokens=24)
    token_codes = random_codes(torch.Generator().manual_seed(1), (ids.shape[0], depth), device)
    out = torch.full((ids.numel(), 2 * columns), -7, dtype=torch.int32, device=device)
    silu, plan = make_activation("silu"), plan_for(ids, 4, blocks)
    grouped_gate_up(token_codes, row_scale, weights, plan, silu, out, tile, pairs_per_row=2)
    out = unsort_rows(plan, out, -7)
    rows = here(ids, 4)
    expected = exact_sums(token_codes.repeat_interleave(2, 0), weights.codes, ids)
    assert torch.equal(out[rows].cpu().long(), expected[rows.cpu()])
    assert (out[~rows] == -7).all()


def test_the_largest_sums_are_exact(device: torch.device) -> None:
    """Every product at its largest, with the sign that float32 accumulation would round: 127 * 128 * 3000 > 2^24."""
    depth = 3000
    codes = torch.full((1, depth), -127, dtype=torch.int8, device=device)
    codes[0, 0] = 1
    w = torch.full((1, 16, depth), -128, dtype=torch.int8, device=device)
    ids = torch.zeros((1, 1), dtype=torch.int32, device=device)
    weights = ExpertWeights(w, torch.ones((1, 16, 1), device=device), None)
    out = torch.zeros((1, 16), dtype=torch.int32, device=device)
    grouped_down(codes, torch.ones(1, device=device), weights, plan_for(ids, 1), out, TILE)
    assert out.unique().tolist() == [127 * 128 * (depth - 1) - 128]
    assert int8_matmul_reference(codes, w[0]).unique().tolist() == out.unique().tolist()


@pytest.mark.parametrize("depth", [1, 1023, 1024, 1025, 4100])
def test_twin_sums_are_exact(depth: int) -> None:
    g = torch.Generator().manual_seed(depth)
    a, b = random_codes(g, (3, depth), "cpu"), random_codes(g, (5, depth), "cpu")
    assert torch.equal(int8_matmul_reference(a, b).long(), a.long() @ b.long().t())


def magnitude_and_value(
    codes: torch.Tensor, row_scale: torch.Tensor, weights: ExpertWeights, ids: torch.Tensor, experts: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """float64 results of the linear part, and the sum of the magnitudes of its two terms."""
    sums = exact_sums(codes, weights.codes, ids).double()
    which = ids.flatten().clamp(0, experts - 1).long().cpu()
    scaled = sums * row_scale.double().cpu().unsqueeze(-1) * weights.scale.double().cpu()[which].squeeze(-1)
    bias: Any = 0.0 if weights.bias is None else weights.bias.double().cpu()[which]
    return scaled + bias, scaled.abs() + abs(bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("bias", [None, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("per_tensor", [False, True])
def test_the_epilogue_of_down_is_within_its_bound(
    dtype: torch.dtype, bias: torch.dtype | None, per_tensor: bool, device: torch.device
) -> None:
    codes, row_scale, weights, ids = inputs(176, 88, device, per_tensor=per_tensor, bias=bias)
    value, magnitude = magnitude_and_value(codes, row_scale, weights, ids, 4)
    # Four float32 roundings (sum to float, two scales, bias) of 2^-24 each, then the store's.
    bound = 4 * 2.0**-24 * magnitude + UNIT_ROUNDOFF[dtype] * value.abs() + 2.0**-25
    rows = here(ids, 4)
    out = torch.full((codes.shape[0], 88), torch.nan, dtype=dtype, device=device)
    plan = plan_for(ids, 4)
    grouped_down(sort_rows(plan, codes), sort_rows(plan, row_scale), weights, plan, out, TILE)
    assert ((out.cpu().double() - value).abs() <= bound)[rows.cpu()].all()
    assert out[~rows].isnan().all()
    twin = grouped_down_reference(codes, row_scale, weights, ids, dtype)
    assert ((twin.cpu().double() - value).abs() <= bound)[rows.cpu()].all()


# Every function that a kernel can compute, with limits that random values pass often enough.
FUNCTIONS = {
    "silu": make_activation("silu"),
    "silu-limited": make_activation("silu", limit=1.25),
    "gelu": make_activation("gelu"),
    "gelu_tanh": make_activation("gelu_tanh"),
    "swigluoai": make_activation("swigluoai", limit=1.25),
    "swiglustep": make_activation("swiglustep", limit=1.25),
    "situ": make_activation("situ", alpha=2.0),
    "situ-limited": make_activation("situ", alpha=2.0, limit=1.25),
    "relu2": make_activation("relu2"),
}


def test_every_activation_is_tested() -> None:
    assert {activation.name for activation in FUNCTIONS.values()} == set(ACTIVATIONS)


def by_definition(gate: Any, up: torch.Tensor, activation: Any) -> Any:
    """The formulas of the documentation, in float64, written from other primitives than the twin's."""
    sigmoid = 1 / (1 + torch.exp(-gate)) if gate is not None else None
    limit, alpha = activation.limit, activation.alpha
    if activation.name == "relu2":
        return torch.where(up > 0, up * up, 0.0)
    if activation.name == "gelu":
        return gate * torch.distributions.Normal(0.0, 1.0).cdf(gate) * up
    if activation.name == "gelu_tanh":
        return 0.5 * gate * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3))) * up
    if activation.name == "situ":
        soft = torch.sinh(up / limit) / torch.cosh(up / limit) * limit if limit else up
        return alpha * torch.sinh(gate / alpha) / torch.cosh(gate / alpha) * sigmoid * soft
    if not limit:
        return gate * sigmoid * up
    up = torch.minimum(torch.maximum(up, torch.tensor(-limit)), torch.tensor(limit))
    if activation.name == "swiglustep":
        return torch.minimum(gate * sigmoid, torch.tensor(limit)) * up
    gate = torch.minimum(gate, torch.tensor(limit))
    if activation.name == "silu":
        return gate / (1 + torch.exp(-gate)) * up
    return gate / (1 + torch.exp(-alpha * gate)) * (up + 1)


@pytest.mark.parametrize("activation", FUNCTIONS.values(), ids=FUNCTIONS)
def test_activations_are_their_definitions(activation: Any) -> None:
    g = torch.Generator().manual_seed(0)
    gate, up = (3 * torch.randn(2000, generator=g, dtype=torch.float64) for _ in range(2))
    gated = gate if activation.gated else None
    expected = by_definition(gated, up, activation)
    torch.testing.assert_close(activate_reference(gated, up, activation), expected, rtol=1e-12, atol=1e-12)


def halves(values: torch.Tensor, activation: Any) -> Any:
    """(gate or None, up) of the sums of a first product."""
    return values.chunk(2, dim=1) if activation.gated else (None, values)


@pytest.mark.parametrize("activation", FUNCTIONS.values(), ids=FUNCTIONS)
@pytest.mark.parametrize("bias", [None, torch.float32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_epilogue_of_gate_up_is_within_its_bound(
    activation: Any, bias: torch.dtype | None, dtype: torch.dtype, device: torch.device
) -> None:
    codes, row_scale, weights, ids = inputs(176, 88 * (1 + activation.gated), device, bias=bias)
    row_scale = row_scale * 3  # past the limit of 1.25 often enough
    router = torch.linspace(0.5, 1.5, ids.numel(), device=device)
    value, magnitude = magnitude_and_value(codes, row_scale * router, weights, ids, 4)
    gate, up = halves(value, activation)
    expected = activate_reference(gate, up, activation)
    # Relative errors of a few 2^-24 in gate and up; an activation has a slope below 1.13 (limit included) and is below
    # |gate| itself, its exponential is good to 2^-22 on GPUs: together well under 2^-19 of (1 + |gate|) * (1 + |up|).
    # Without a gate, the square has a slope of 2 |up|.
    gate_magnitude, up_magnitude = halves(magnitude, activation)
    inner = 2.0**-19 * (1 + up_magnitude) * (1 + (up_magnitude if gate_magnitude is None else gate_magnitude))
    bound = inner + UNIT_ROUNDOFF[dtype] * expected.abs()
    rows = here(ids, 4)
    out = torch.full((codes.shape[0], 88), torch.nan, dtype=dtype, device=device)
    options: dict[str, Any] = {"router_weight": router, "pairs_per_row": 1}
    plan = plan_for(ids, 4)
    grouped_gate_up(codes, row_scale, weights, plan, activation, out, TILE, **options)
    out = unsort_rows(plan, out, torch.nan)
    assert ((out.cpu().double() - expected).abs() <= bound)[rows.cpu()].all()
    assert out[~rows].isnan().all()
    twin = grouped_gate_up_reference(codes, row_scale, weights, ids, activation, dtype, **options)
    assert ((twin.cpu().double() - expected).abs() <= bound)[rows.cpu()].all()


@pytest.mark.parametrize("activation", FUNCTIONS.values(), ids=FUNCTIONS)
def test_large_values_saturate_and_nan_stays_in_its_row(activation: Any, device: torch.device) -> None:
    """Gates of +-1e4 overflow a naive exponential; a NaN scale must survive the clamps and touch only its row."""
    g = torch.Generator().manual_seed(3)
    codes = random_codes(g, (4, 64), device)
    columns = 16 * (1 + activation.gated)
    weights = ExpertWeights(random_codes(g, (1, columns, 64), device), torch.ones((1, columns, 1), device=device), None)
    ids = torch.zeros((4, 1), dtype=torch.int32, device=device)
    row_scale = torch.tensor([0.1, torch.nan, 0.1, 1e-30], device=device)
    out = torch.zeros((4, 16), device=device)
    grouped_gate_up(codes, row_scale, weights, plan_for(ids, 1), activation, out, TILE, pairs_per_row=1)
    twin = grouped_gate_up_reference(codes, row_scale, weights, ids, activation, torch.float32, pairs_per_row=1)
    assert out[1].isnan().all()
    assert out[[0, 2, 3]].isfinite().all()
    torch.testing.assert_close(out, twin, rtol=2.0**-18, atol=1e-6, equal_nan=True)


def test_tiles_do_not_change_a_bit(device: torch.device) -> None:
    codes, row_scale, weights, ids = inputs(176, 2 * 88, device, tokens=24, bias=torch.float32)
    silu = make_activation("silu")
    tiles = (TILE, WIDE, TileOptions(16, 128, 4, 4, 1), TileOptions(32, 64, 2, 4, 2, descriptors=False))
    results = []
    for blocks, tile in zip((*CUTS, RowBlocks(64)), tiles, strict=True):
        out = torch.zeros((codes.shape[0], 88), dtype=torch.bfloat16, device=device)
        plan = plan_for(ids, 4, blocks)
        grouped_gate_up(codes, row_scale, weights, plan, silu, out, tile, pairs_per_row=1)
        results.append(unsort_rows(plan, out, 0))
    assert results[0].any()
    for result in results[1:]:
        assert torch.equal(results[0], result)


def test_activations_follow_their_formulas() -> None:
    """The definitions, on numbers worked out by hand: sigmoid(0) = 1/2, and clamps at 7 on both sides."""
    gate, up = torch.tensor([0.0, 1e3, 1e3, -1e3]), torch.tensor([3.0, 100.0, -100.0, 2.0])
    assert activate_reference(gate, up, make_activation("silu")).tolist() == [0.0, 1e5, -1e5, -0.0]
    assert activate_reference(gate, up, make_activation("swiglustep")).tolist() == [0.0, 49.0, -49.0, -0.0]
    oai = activate_reference(gate, up, make_activation("swigluoai"))
    saturated = 7 * torch.sigmoid(torch.tensor(1.702 * 7)).item()
    torch.testing.assert_close(oai, torch.tensor([0.0, saturated * 8, saturated * -6, -0.0]))
    # The clamp of deepseek_v4 and glm5_next: gate from above, up on both sides, before the activation.
    limited = activate_reference(gate, up, make_activation("silu", limit=7.0))
    saturated = 7 * torch.sigmoid(torch.tensor(7.0)).item()
    torch.testing.assert_close(limited, torch.tensor([0.0, saturated * 7, saturated * -7, -0.0]))
    # kimi_k3: tanh(0) = 0, tanh of a large value is 1.
    situ = activate_reference(gate, up, make_activation("situ", alpha=4.0))
    torch.testing.assert_close(situ, torch.tensor([0.0, 400.0, -400.0, -0.0]))
    situ = activate_reference(gate, up * 1e3, make_activation("situ", alpha=4.0, limit=2.0))
    torch.testing.assert_close(situ, torch.tensor([0.0, 8.0, -8.0, -0.0]))
    assert activate_reference(None, up, make_activation("relu2")).tolist() == [9.0, 1e4, 0.0, 4.0]
    names = "silu, gelu, gelu_tanh, swigluoai, swiglustep, situ, relu2"
    with pytest.raises(ValueError, match=f"expected one of {names}, found 'relu'"):
        make_activation("relu")
    with pytest.raises(ValueError, match="activation_limit: expected None"):
        make_activation("gelu", limit=7.0)
    with pytest.raises(ValueError, match="activation_alpha: expected a number"):
        make_activation("situ")
    with pytest.raises(ValueError, match="activation_alpha: expected None"):
        make_activation("swiglustep", alpha=1.0)
    with pytest.raises(ValueError, match="positive finite"):
        make_activation("swigluoai", limit=float("nan"))
