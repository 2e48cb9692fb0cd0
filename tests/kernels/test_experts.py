"""The whole forward: each stage from what the stage before it left, then end to end.

Comparing stage by stage keeps the bounds tight: end to end, a last-bit difference in the activation can move an int8
code by one step, and the bound would have to allow for that everywhere.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from quarkconv.kernels import fused_experts_int8, fused_experts_int8_reference
from quarkconv.kernels.arguments import check_arguments
from quarkconv.kernels.backend import device_traits
from quarkconv.kernels.launch.combine import combine_experts, combine_experts_reference
from quarkconv.kernels.launch.grouped_gemm import grouped_down_reference, grouped_gate_up_reference
from quarkconv.kernels.launch.quantize import quantize_rows_reference
from quarkconv.kernels.options import choose_launch_options
from quarkconv.kernels.pipeline import default_options, empty_workspace, run_pipeline
from quarkconv.kernels.tables import GemvOptions, LaunchOptions, RowBlocks, TileOptions, VectorTile

pytestmark = pytest.mark.long(30)

UNIT_ROUNDOFF = {torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}

# M, H, I, E, K
SHAPES = [(1, 96, 80, 4, 2), (5, 176, 88, 8, 3), (17, 80, 96, 3, 1)]
NARROW = [(1, 96, 80, 4, 2), (3, 48, 24, 4, 3), (9, 24, 40, 3, 1)]
"""For tiles of 2 to 8 columns: the interpreter takes as long for a tile of any width."""


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def poison(workspace: Any) -> None:
    """Fill the buffers with what would show: NaN, and codes and indices that no stage writes."""
    for name in ("input_scale", "activated", "hidden_scale", "expert_out"):
        if getattr(workspace, name) is not None:
            getattr(workspace, name).fill_(math.nan)
    for name in ("input_codes", "hidden_codes"):
        getattr(workspace, name).fill_(-128)


TILE = TileOptions(block_n=32, block_k=64, group_m=2, num_warps=4, num_stages=2)
LAUNCHES: dict[str, LaunchOptions | GemvOptions] = {
    "sorted": LaunchOptions(RowBlocks(16), TILE, TILE),
    "tails": LaunchOptions(RowBlocks(32, 16, 16), TILE, TileOptions(64, 32, 1, 4, 3, descriptors=False)),
    "gemv": GemvOptions(VectorTile(32, 4), VectorTile(64, 8)),
}


def by_pair(plan: Any, rows: torch.Tensor, rest: float) -> torch.Tensor:
    """Rows in the plan's order, [P, ...], as rows of pairs; those of pairs that it leaves out hold `rest`."""
    if plan is None:
        return rows
    out = torch.full_like(rows, rest)
    used = plan.totals[1].item()
    out[plan.pairs[:used].long()] = rows[:used]
    return out


def check_stages(case: Any, launch: Any = None, **options: Any) -> torch.Tensor:
    """Run the kernels on poisoned buffers and check every stage against the twin of that stage alone."""
    arguments = check_arguments(*case.tensors(), **options)
    launch = launch or default_options(arguments)
    buffers = empty_workspace(arguments, launch)
    poison(buffers)
    out = torch.full_like(case.hidden_states, math.nan)
    run_pipeline(arguments, out, launch, buffers)

    ids, experts, dtype = case.topk_ids, case.w13.shape[0], out.dtype
    on_input = arguments.apply_router_weight_on_input
    static = arguments.gate_up_input_scale is not None
    here = ((ids >= 0) & (ids < experts)).flatten()

    codes, scale = quantize_rows_reference(
        case.hidden_states,
        topk_ids=ids if static else None,
        num_experts=experts,
        expert_scale=arguments.gate_up_input_scale,
        router_weight=case.topk_weights if static and on_input else None,
        pairs_per_row=ids.shape[1] if static else 1,
    )
    quantized = here if static else slice(None)
    assert torch.equal(buffers.input_codes[quantized], codes[quantized])
    assert torch.equal(buffers.input_scale[quantized], scale[quantized])

    activated = grouped_gate_up_reference(
        codes,
        scale,
        arguments.gate_up,
        ids,
        arguments.activation,
        dtype,
        router_weight=case.topk_weights if on_input and not static else None,
        pairs_per_row=1 if static else ids.shape[1],
    )
    found_activated = by_pair(buffers.plan, buffers.activated, math.nan)
    # The float32 epilogues differ in a few last bits, which can flip the rounding to `dtype` by one unit.
    one_unit: dict[str, Any] = {"rtol": 2 * UNIT_ROUNDOFF[dtype], "atol": 1e-6}
    torch.testing.assert_close(found_activated[here], activated[here], **one_unit)

    codes, scale = quantize_rows_reference(
        found_activated, topk_ids=ids, num_experts=experts, expert_scale=arguments.down_input_scale
    )
    assert torch.equal(by_pair(buffers.plan, buffers.hidden_codes, -128)[here], codes[here])
    assert torch.equal(by_pair(buffers.plan, buffers.hidden_scale, math.nan)[here], scale[here])

    expected = expert_out = grouped_down_reference(codes, scale, arguments.down, ids, dtype)
    if buffers.expert_out is not None:
        expert_out = buffers.expert_out
        torch.testing.assert_close(expert_out[here], expected[here], **one_unit)
        assert expert_out[~here].isnan().all()
    # As many rows as pairs without an expert are never written.
    assert found_activated[~here].isnan().all()
    assert buffers.activated.isnan().all(1).sum() == (~here).sum()

    weights = torch.ones_like(case.topk_weights) if on_input else case.topk_weights
    combined = combine_experts_reference(expert_out, weights, ids, experts, dtype)
    # K float32 roundings of terms that may cancel, then the store's; where the kernel keeps y to itself, y may be one
    # unit off, as above.
    terms = (expert_out.double().view(*ids.shape, -1) * weights.double().unsqueeze(-1)).abs().nan_to_num().sum(1)
    of_terms = ids.shape[1] * 2.0**-23 + (2 * UNIT_ROUNDOFF[dtype] if buffers.expert_out is None else 0)
    bound = 2 * UNIT_ROUNDOFF[dtype] * combined.double().abs() + of_terms * terms + 1e-6
    assert ((out.double() - combined.double()).abs() <= bound).all()
    return out


@pytest.mark.parametrize("number", range(len(SHAPES)))
@pytest.mark.parametrize("launch", LAUNCHES)
def test_each_stage_equals_its_twin(number: int, launch: str, make_case: Callable[..., Any]) -> None:
    """Every launch with every shape, and each of them with both dtypes."""
    dtype = (torch.bfloat16, torch.float16)[(number + list(LAUNCHES).index(launch)) % 2]
    check_stages(make_case(*SHAPES[number], dtype=dtype), LAUNCHES[launch])


@pytest.mark.parametrize(
    "options",
    [
        {"activation": "silu", "activation_limit": 0.5},
        {"activation": "gelu"},
        {"activation": "gelu_tanh"},
        {"activation": "situ", "activation_alpha": 4.0, "activation_limit": 2.0},
        {"activation": "swigluoai"},
        {"activation": "swiglustep", "activation_limit": 0.75},
        {"apply_router_weight_on_input": True},
    ],
    ids=lambda options: "-".join(str(value) for value in options.values()),
)
def test_each_stage_equals_its_twin_with_options(options: Any, make_case: Callable[..., Any]) -> None:
    check_stages(make_case(5, 96, 80, 4, 2, ids_dtype=torch.int64), **options)


def without_gate(case: Any) -> Any:
    """The same experts with the up half only: w13 is [E, I, H]."""
    half = case.w13.shape[1] // 2
    return case.replace(w13=case.w13[:, half:].contiguous(), w13_scale=case.w13_scale[:, half:].contiguous())


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
@pytest.mark.parametrize("on_input", [False, True])
def test_each_stage_equals_its_twin_without_a_gate(
    launch: Any, on_input: bool, make_case: Callable[..., Any], device: torch.device
) -> None:
    g = torch.Generator().manual_seed(6)
    case = without_gate(make_case(5, 96, 80, 4, 2))
    case.topk_ids[1, 1] = -1
    for bias in ({}, {"w13_bias": torch.randn(4, 80, generator=g).to(device)}):
        check_stages(case, launch, activation="relu2", apply_router_weight_on_input=on_input, **bias)


@pytest.mark.parametrize("implementation", [fused_experts_int8, fused_experts_int8_reference])
def test_without_a_gate_close_to_float64_experts(
    implementation: Callable[..., torch.Tensor], make_case: Callable[..., Any], device: torch.device
) -> None:
    """nemotron_h: relu(x w_up^T)^2 w_down^T. Squares have heavier tails than the products of the gated test above."""
    case = without_gate(make_case(9, 96, 80, 4, 2))
    g = torch.Generator().manual_seed(7)
    biases = {"w13_bias": torch.randn(4, 80, generator=g), "w2_bias": torch.randn(4, 96, generator=g)}
    out = implementation(*case.tensors(), activation="relu2", **{k: v.to(device) for k, v in biases.items()})
    w13, w2 = (case.w13.double() * case.w13_scale).cpu(), (case.w2.double() * case.w2_scale).cpu()
    expected = torch.zeros_like(case.hidden_states, dtype=torch.float64, device="cpu")
    for t, x in enumerate(case.hidden_states.double().cpu()):
        for e, r in zip(case.topk_ids[t].tolist(), case.topk_weights[t].tolist(), strict=True):
            h = (w13[e] @ x + biases["w13_bias"][e]).clamp(min=0) ** 2
            expected[t] += r * (w2[e] @ h + biases["w2_bias"][e])
    assert relative_rms(out.cpu(), expected) < 0.03


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_each_stage_equals_its_twin_with_static_scales_and_biases(
    on_input: bool, launch: Any, make_case: Callable[..., Any], device: torch.device
) -> None:
    g = torch.Generator().manual_seed(5)
    case = make_case(5, 96, 80, 4, 2)
    case.topk_ids[1, 1] = -1
    check_stages(
        case,
        launch,
        w13_input_scale=torch.tensor([0.02, 0.03, 0.04, 0.01], device=device),
        w2_input_scale=torch.tensor([0.02, 0.01, 0.005, 0.03], device=device),
        w13_bias=torch.randn(4, 160, generator=g).to(device),
        w2_bias=torch.randn(4, 96, generator=g).bfloat16().to(device),
        apply_router_weight_on_input=on_input,
    )


def test_each_stage_equals_its_twin_with_per_tensor_weight_scales(make_case: Callable[..., Any]) -> None:
    case = make_case(5, 96, 80, 4, 2)
    check_stages(case.replace(w13_scale=case.w13_scale[:, :1].contiguous(), w2_scale=case.w2_scale[:, :1].contiguous()))


def test_per_tensor_scales_equal_repeated_ones(make_case: Callable[..., Any]) -> None:
    case = make_case(5, 96, 80, 4, 2)
    single = case.replace(w13_scale=case.w13_scale[:, :1].contiguous(), w2_scale=case.w2_scale[:, :1].contiguous())
    repeated = single.replace(
        w13_scale=single.w13_scale.expand(-1, 160, 1).contiguous(),
        w2_scale=single.w2_scale.expand(-1, 96, 1).contiguous(),
    )
    assert torch.equal(fused_experts_int8(*single.tensors()), fused_experts_int8(*repeated.tensors()))


@pytest.mark.parametrize("implementation", [fused_experts_int8, fused_experts_int8_reference])
@pytest.mark.parametrize("on_input", [False, True])
def test_close_to_unquantized_activations(
    implementation: Callable[..., torch.Tensor], on_input: bool, make_case: Callable[..., Any]
) -> None:
    """Against float64 experts written from the definition, with dequantized weights and activations as they are.

    Rounding to one of 127 steps of the largest of about a hundred normal values (2.5 sigma) leaves a relative error of
    2.5 / 127 / sqrt(12) = 0.6 %, twice (x and h; a product has heavier tails, so more); 3 % catches anything that is
    not rounding.
    """
    case = make_case(9, 96, 80, 4, 2)
    out = implementation(*case.tensors(), apply_router_weight_on_input=on_input)
    w13, w2 = case.w13.double() * case.w13_scale, case.w2.double() * case.w2_scale
    expected = torch.zeros_like(case.hidden_states, dtype=torch.float64)
    for t, x in enumerate(case.hidden_states.double()):
        for e, r in zip(case.topk_ids[t].tolist(), case.topk_weights[t].tolist(), strict=True):
            gate_up = w13[e] @ (x * r if on_input else x)
            gate, up = gate_up[:80], gate_up[80:]
            y = w2[e] @ (gate / (1 + torch.exp(-gate)) * up)
            expected[t] += y if on_input else r * y
    assert relative_rms(out, expected) < 0.03


@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_ranks_add_up_to_the_whole(ids_dtype: torch.dtype, make_case: Callable[..., Any]) -> None:
    """Two ranks with half of the experts each add up to the whole; a token without experts there gets exactly 0."""
    case = make_case(6, 96, 80, 4, 2, ids_dtype=ids_dtype)
    case.topk_ids[2] = torch.tensor([0, 1])
    whole = fused_experts_int8(*case.tensors())
    total = torch.zeros_like(whole, dtype=torch.float32)
    for first in (0, 2):
        part = slice(first, first + 2)
        local = torch.where((case.topk_ids >= first) & (case.topk_ids < first + 2), case.topk_ids - first, -1)
        rank = case.replace(
            w13=case.w13[part],
            w2=case.w2[part],
            w13_scale=case.w13_scale[part],
            w2_scale=case.w2_scale[part],
            topk_ids=local.to(ids_dtype),
        )
        out = check_stages(rank)
        if first == 2:
            assert (out[2] == 0).all()
        total += out.float()
    # Each rank rounds once, and so does the whole.
    bound = 2.0**-8 * 3 * (whole.float().abs() + total.abs()) + 1e-2
    assert ((whole.float() - total).abs() <= bound).all()


def test_a_rank_without_pairs_gives_zeros(make_case: Callable[..., Any]) -> None:
    case = make_case(3, 96, 80, 4, 2)
    out = torch.full_like(case.hidden_states, math.nan)
    nowhere = case.replace(topk_ids=torch.full_like(case.topk_ids, -1))
    assert fused_experts_int8(*nowhere.tensors(), out=out) is out
    assert (out == 0).all()


@pytest.mark.parametrize("implementation", [fused_experts_int8, fused_experts_int8_reference])
def test_no_tokens_and_no_slots_give_zeros(
    implementation: Callable[..., torch.Tensor], make_case: Callable[..., Any]
) -> None:
    empty = make_case(0, 96, 80, 4, 2)
    assert implementation(*empty.tensors()).shape == (0, 96)
    case = make_case(3, 96, 80, 4, 1)
    slotless = case.replace(topk_weights=case.topk_weights[:, :0], topk_ids=case.topk_ids[:, :0])
    out = torch.full_like(case.hidden_states, math.nan)
    implementation(*slotless.tensors(), out=out)
    assert (out == 0).all()


def test_a_token_may_choose_an_expert_twice(make_case: Callable[..., Any]) -> None:
    """Nothing in the layout needs a token's experts to differ."""
    case = make_case(4, 96, 80, 4, 2)
    case.topk_ids.fill_(1)
    check_stages(case)


@pytest.mark.parametrize(
    ("bad", "static", "activation"),
    [
        (math.nan, False, "silu"),
        (math.inf, True, "silu"),
        (math.inf, False, "swigluoai"),
        (math.nan, True, "swigluoai"),
    ],
)
@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_token_that_is_not_finite_keeps_to_itself(
    bad: float, static: bool, activation: Any, make_case: Callable[..., Any], device: torch.device
) -> None:
    case = make_case(4, 96, 80, 4, 2)
    scale = torch.full((4,), 0.03, device=device)
    options: dict[str, Any] = {"activation": activation} | (
        {"w13_input_scale": scale, "w2_input_scale": scale} if static else {}
    )
    clean = fused_experts_int8(*case.tensors(), **options)
    case.hidden_states[2, 50] = bad
    spoiled = fused_experts_int8(*case.tensors(), **options)
    for out in (spoiled, fused_experts_int8_reference(*case.tensors(), **options)):
        assert out[2].isnan().all()
    others = [0, 1, 3]
    assert torch.equal(spoiled[others], clean[others])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_deterministic_and_independent_of_the_batch(
    dtype: torch.dtype, make_case: Callable[..., Any]
) -> None:
    """The same bits run to run, with other tiles and paths, and for a token alone as among others."""
    case = make_case(4, 112, 56, 4, 2, dtype=dtype)
    out = fused_experts_int8(*case.tensors())
    assert torch.equal(out, fused_experts_int8(*case.tensors()))
    arguments = check_arguments(*case.tensors())
    for launch in LAUNCHES.values():
        other = torch.full_like(out, math.nan)
        assert torch.equal(out, run_pipeline(arguments, other, launch))
    for t in (0, 3):
        one = slice(t, t + 1)
        alone = case.replace(
            hidden_states=case.hidden_states[one], topk_weights=case.topk_weights[one], topk_ids=case.topk_ids[one]
        )
        assert torch.equal(fused_experts_int8(*alone.tensors()), out[one])


@pytest.mark.parametrize("launch", [LAUNCHES["sorted"], LAUNCHES["tails"]], ids=["sorted", "tails"])
def test_one_expert_takes_all(launch: Any, make_case: Callable[..., Any]) -> None:
    """The most uneven routing, in every kind of row block: whole, with a tail, short."""
    case = make_case(75, 48, 40, 3, 1)
    case.topk_ids.fill_(1)
    case.topk_ids[70:] = 2
    check_stages(case, launch)


def test_output_may_be_the_input_and_rows_may_be_apart(make_case: Callable[..., Any]) -> None:
    case = make_case(5, 96, 80, 4, 2)
    expected = fused_experts_int8(*case.tensors())
    apart = torch.full((5, 200), math.nan, dtype=torch.bfloat16, device=expected.device)[:, 8:104]
    apart.copy_(case.hidden_states)
    assert torch.equal(fused_experts_int8(*case.replace(hidden_states=apart).tensors()), expected)
    assert torch.equal(fused_experts_int8(*case.tensors(), out=case.hidden_states), expected)
    assert torch.equal(case.hidden_states, expected)


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_weights_may_lie_at_any_address(launch: Any, make_case: Callable[..., Any]) -> None:
    """Slices of a larger tensor: contiguous, at an address that is not a multiple of 16, or of 4."""
    case = make_case(5, 96, 80, 4, 2)
    expected = fused_experts_int8(*case.tensors())
    for offset in (1, 4, 8):
        moved = {}
        for name in ("w13", "w2"):
            tensor = getattr(case, name)
            buffer = torch.full((tensor.numel() + 16,), 99, dtype=torch.int8, device=tensor.device)
            moved[name] = buffer[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)
        if offset % 4 and isinstance(launch, GemvOptions):
            assert torch.equal(fused_experts_int8(*case.replace(**moved).tensors()), expected)
            continue
        out = torch.full_like(expected, math.nan)
        assert torch.equal(run_pipeline(check_arguments(*case.replace(**moved).tensors()), out, launch), expected)


@pytest.mark.parametrize("shape", NARROW)
def test_end_to_end_equals_twin(shape: Any, make_case: Callable[..., Any], device: torch.device) -> None:
    """A flipped bit of an activation moves its code by at most one of 127 steps: far below 1 % of the result.

    With the heuristic's own tiles, which other tests widen in the interpreter.
    """
    case = make_case(*shape)
    tokens, hidden, intermediate, experts, top_k = shape
    launch = choose_launch_options(tokens, experts, top_k, hidden, intermediate, device_traits(device))
    out = torch.full_like(case.hidden_states, math.nan)
    run_pipeline(check_arguments(*case.tensors()), out, launch)
    assert relative_rms(out, fused_experts_int8_reference(*case.tensors())) < 0.01
    assert torch.equal(out, fused_experts_int8(*case.tensors()))


def test_cpu_tensors_take_the_torch_path(make_case: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr("quarkconv.kernels.pipeline.run_pipeline", None)  # calling it would fail
    case = make_case(3, 96, 80, 4, 2)
    cpu = case.replace(**{name: getattr(case, name).cpu() for name in case.__dataclass_fields__})
    out = torch.empty_like(cpu.hidden_states)
    assert fused_experts_int8(*cpu.tensors(), out=out) is out
    assert torch.equal(out, fused_experts_int8_reference(*cpu.tensors()))


@pytest.mark.parametrize("hidden", [8, 1100])
def test_skipped_slots_do_not_reach_the_sum(hidden: int, device: torch.device) -> None:
    """Poisoned rows and weights of skipped slots must not reach the sum; more columns than a block has."""
    g = torch.Generator().manual_seed(hidden)
    ids = torch.tensor([[0, -1, 2], [-1, -1, -1], [1, 3, 0]], dtype=torch.int32, device=device)
    values = torch.randn(9, hidden, generator=g).to(device)
    weights = torch.rand(3, 3, generator=g).to(device)
    skipped = (ids < 0) | (ids >= 3)
    values[skipped.flatten()] = math.nan
    weights[skipped] = math.nan
    out = torch.full((3, hidden), math.nan, device=device)
    combine_experts(values, weights, ids, 3, out)
    torch.testing.assert_close(out, combine_experts_reference(values, weights, ids, 3, torch.float32))
    assert (out[1] == 0).all()
    assert out.isfinite().all()
