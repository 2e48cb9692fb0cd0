"""The warp-specialized products, on rows that are sorted beforehand.

The warps need a GPU of the right kind. All other code is the same everywhere: on other devices, options that request
such warps get the other kernel on sorted rows.
"""

import math
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.races import CONSUMERS, PRODUCER, delayed_kernel

from quarkconv.kernels.activations import ACTIVATIONS, make_activation
from quarkconv.kernels.arguments import ExpertWeights, check_arguments
from quarkconv.kernels.backend import device_traits
from quarkconv.kernels.launch.grouped_gemm import grouped_down, grouped_gate_up
from quarkconv.kernels.launch.quantize import quantize_rows, quantize_rows_reference
from quarkconv.kernels.launch.routing import empty_plan, route_pairs
from quarkconv.kernels.options import fit_options
from quarkconv.kernels.pipeline import empty_workspace, run_pipeline
from quarkconv.kernels.tables import LaunchOptions, RowBlocks, TileOptions

pytestmark = pytest.mark.long(15)

PORTABLE = TileOptions(64, 64, 1, 4, 2, descriptors=False)
GATE_UP = TileOptions(64, 128, 2, 4, 4, specialized=True)
DOWN = TileOptions(128, 128, 2, 4, 4, specialized=True)
# Two groups of warps that take turns, each with a tile of its own, or that share one of twice the width.
TILES = {
    "turns": (GATE_UP, DOWN),
    "shares": (replace(GATE_UP, block_n=128, num_warps=8), replace(DOWN, block_n=256, num_warps=8)),
}
# A tail; short blocks; both, and blocks of less than a whole tile.
CUTS = [RowBlocks(128, 32), RowBlocks(128, 0, 64), RowBlocks(64, 16, 32), RowBlocks(16)]


def forward(case: Any, options: LaunchOptions, device: torch.device, **more: Any) -> torch.Tensor:
    arguments = check_arguments(*case.tensors(), **more)
    hidden, intermediate = arguments.hidden, arguments.intermediate
    out = torch.full_like(case.hidden_states, math.nan)
    return run_pipeline(arguments, out, fit_options(options, hidden, intermediate, device_traits(device)))


@pytest.mark.parametrize("top_k", [1, 2, 3])
@pytest.mark.parametrize("width", [48, 2056])
def test_each_row_is_quantized_once_and_written_to_all_its_rows(top_k: int, width: int, device: torch.device) -> None:
    g = torch.Generator().manual_seed(width)
    x = torch.randn((9, width), generator=g).to(torch.bfloat16).to(device)
    x[4, 3] = math.nan
    ids = torch.randint(-1, 5, (9, top_k), generator=g).to(torch.int32).to(device)  # 4 is another rank's
    plan = route_pairs(ids, 4, empty_plan(ids.numel(), 4, RowBlocks(16), ids.device))
    codes = torch.full((ids.numel(), width), 99, dtype=torch.int8, device=device)
    scales = torch.full((ids.numel(),), -7.0, device=device)
    quantize_rows(x, codes=codes, scales=scales, topk_ids=ids, plan=plan, num_experts=4, copies=top_k)
    expected_codes, expected_scales = quantize_rows_reference(x)
    rows = plan.totals[1].item()
    token = plan.pairs[:rows].long() // top_k
    assert torch.equal(codes[:rows], expected_codes[token])
    assert torch.equal(scales[:rows].nan_to_num(nan=-1), expected_scales[token].nan_to_num(nan=-1))
    assert (codes[rows:] == 99).all()
    assert (scales[rows:] == -7).all()


@pytest.mark.parametrize("static", [None, "w13_input_scale", "w2_input_scale"])
@pytest.mark.parametrize("on_input", [False, True])
def test_sorted_rows_change_no_bit(
    static: str | None, on_input: bool, make_case: Callable[..., Any], device: torch.device
) -> None:
    """Options that request specialized warps, whether or not the device has them."""
    case = make_case(20, 80, 48, 2, 2)  # both experts have all tokens: a block of 16, and a tail
    case.topk_ids[5:9, 1] = -1
    more: dict[str, Any] = {} if static is None else {static: torch.linspace(0.02, 0.04, 2, device=device)}
    more["apply_router_weight_on_input"] = on_input
    options = LaunchOptions(RowBlocks(16, 16), GATE_UP, DOWN)
    expected = forward(case, LaunchOptions(RowBlocks(16), PORTABLE, PORTABLE), device, **more)
    assert expected.isfinite().all()
    # Sizes that are not multiples of 128 never fit: they are requested as they are.
    arguments = check_arguments(*case.tensors(), **more)
    workspace = empty_workspace(arguments, options)
    assert workspace.input_codes.shape[0] == 40
    out = torch.full_like(expected, math.nan)
    assert torch.equal(run_pipeline(arguments, out, options, workspace), expected)


needs_specialization = pytest.mark.skipif(
    not device_traits(torch.device("cuda" if torch.cuda.is_available() else "cpu")).warp_specialization,
    reason="needs NVIDIA's Hopper and a Triton whose Gluon was tested",
)


def weights_for(
    g: torch.Generator,
    experts: int,
    columns: int,
    depth: int,
    device: torch.device,
    *,
    per_tensor: bool = False,
    bias: torch.dtype | None = None,
) -> ExpertWeights:
    return ExpertWeights(
        codes=torch.randint(-128, 128, (experts, columns, depth), generator=g, dtype=torch.int8, device=device),
        scale=(0.5 + torch.rand((experts, 1 if per_tensor else columns, 1), generator=g, device=device)) / 1000,
        bias=None if bias is None else torch.randn((experts, columns), generator=g, device=device).to(bias),
    )


def uneven_ids(g: torch.Generator, pairs: int, experts: int, device: torch.device) -> torch.Tensor:
    """Experts with a whole block, a tail, next to nothing and nothing, and pairs of another rank."""
    ids = torch.randint(0, experts - 1, (pairs, 1), generator=g, device=device)
    ids[:140], ids[140:160], ids[160:165] = 0, -1, experts - 2
    return ids.to(torch.int32)


@pytest.mark.gpu
@needs_specialization
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("blocks", CUTS, ids=str)
@pytest.mark.parametrize(("depth", "columns"), [(128, 64), (16, 8), (1408, 176), (3072, 200)])
def test_sums_and_results_are_those_of_the_portable_kernel(
    tiles: str, blocks: RowBlocks, depth: int, columns: int, device: torch.device
) -> None:
    """More tiles than processors for the larger ones, in three launches on one plan: each finds the counter at 0."""
    g = torch.Generator(device=device).manual_seed(depth)
    experts, pairs = 24, 1500
    ids = uneven_ids(g, pairs, experts, device)
    plan = route_pairs(ids, experts, empty_plan(pairs, experts, blocks, device))
    plain = route_pairs(ids, experts, empty_plan(pairs, experts, RowBlocks(16), device))
    codes = torch.randint(-127, 128, (pairs, depth), generator=g, dtype=torch.int8, device=device)
    row_scale = 0.5 + torch.rand(pairs, generator=g, device=device)
    silu = make_activation("silu")
    gate_up, down = TILES[tiles]
    for dtype in (torch.int32, torch.bfloat16):
        both = weights_for(g, experts, 2 * columns, depth, device)
        shape = (pairs, (2 if dtype == torch.int32 else 1) * columns)
        found, expected = (torch.full(shape, -7, dtype=dtype, device=device) for _ in range(2))
        grouped_gate_up(codes, row_scale, both, plan, silu, found, gate_up, pairs_per_row=0)
        grouped_gate_up(codes, row_scale, both, plain, silu, expected, PORTABLE, pairs_per_row=0)
        assert torch.equal(found, expected)
        weights = weights_for(g, experts, columns, depth, device)
        found, expected = (torch.full((pairs, columns), -7, dtype=dtype, device=device) for _ in range(2))
        grouped_down(codes, row_scale, weights, plan, found, down)
        grouped_down(codes, row_scale, weights, plain, expected, PORTABLE)
        assert torch.equal(found, expected)
    assert plan.totals[2] == 0


@pytest.mark.gpu
@needs_specialization
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_everything_that_a_forward_can_have(
    tiles: str, activation: Any, dtype: torch.dtype, make_case: Callable[..., Any], device: torch.device
) -> None:
    columns = 1120
    case = make_case(601, 1040, 560, 6, 2, dtype=dtype, ids_dtype=torch.int64)
    case.topk_ids[:290] = torch.tensor([0, 1])
    case.topk_ids[290:296] = torch.tensor([2, -1])
    case = case.replace(w13_scale=case.w13_scale.mean((1, 2), keepdim=True))
    if activation == "relu2":
        columns = 560
        case = case.replace(w13=case.w13[:, :560].contiguous())
    parameters = {"activation": activation} | ({"activation_alpha": 4.0} if activation == "situ" else {})
    bias = {
        "w13_bias": torch.randn((6, columns), device=device),
        "w2_bias": torch.randn((6, 1040), device=device).to(dtype),
    }
    options = LaunchOptions(RowBlocks(128, 32, 64), *TILES[tiles])
    for more in (
        bias,
        {"apply_router_weight_on_input": True},
        {"w2_input_scale": torch.full((6,), 0.03, device=device)},
    ):
        found = forward(case, options, device, **parameters, **more)
        plain = LaunchOptions(RowBlocks(16), PORTABLE, PORTABLE)
        expected = forward(case, plain, device, **parameters, **more)
        assert expected.isfinite().all()
        assert torch.equal(found, expected)


@pytest.mark.gpu
@needs_specialization
@pytest.mark.parametrize("tiles", TILES)
def test_long_queues_replay_under_a_graph(tiles: str, make_case: Callable[..., Any], device: torch.device) -> None:
    """Hundreds of tiles for each processor, replayed with other inputs and routings."""
    case = make_case(4096, 512, 256, 64, 8)
    arguments = check_arguments(*case.tensors())
    options = LaunchOptions(RowBlocks(16, 16), *TILES[tiles])
    out = torch.empty_like(case.hidden_states)
    workspace = empty_workspace(arguments, options)
    run_pipeline(arguments, out, options, workspace)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run_pipeline(arguments, out, options, workspace)
    for seed in range(1, 4):
        other = make_case(4096, 512, 256, 64, 8, seed=seed)
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            getattr(case, name).copy_(getattr(other, name))
        if seed == 2:
            case.topk_ids.fill_(-1)
            case.topk_ids[:, 0] = 5
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, forward(case, LaunchOptions(RowBlocks(16), PORTABLE, PORTABLE), device))


@pytest.mark.gpu
@needs_specialization
@pytest.mark.parametrize("tiles", TILES)
def test_the_same_bits_a_thousand_times_beside_other_work(
    tiles: str, make_case: Callable[..., Any], device: torch.device
) -> None:
    """A race between producer and consumers would show when SMs and memory are shared with changing other work."""
    case = make_case(700, 1024, 384, 12, 4)
    specialized = LaunchOptions(RowBlocks(128, 32, 64), *TILES[tiles])
    expected = forward(case, LaunchOptions(RowBlocks(16), PORTABLE, PORTABLE), device)
    arguments, other = check_arguments(*case.tensors()), torch.cuda.Stream()
    options = fit_options(specialized, 1024, 384, device_traits(device))
    noise = torch.randn((2048, 2048), device=device)
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for turn in range(1000):
        with torch.cuda.stream(other):
            if turn % 3:
                noise = (noise[: 256 * (turn % 8 + 1)].t() @ noise[: 256 * (turn % 8 + 1)]).clamp(-1, 1)
        out = run_pipeline(arguments, torch.empty_like(expected), options)
        differing += (out != expected).sum()
    torch.cuda.synchronize()
    assert differing.item() == 0


# Who sleeps, whether operands are released before they are read, and how often the forward runs.
RACES = [
    pytest.param(PRODUCER, False, 500, id="slow producer"),
    pytest.param(CONSUMERS, False, 500, id="slow consumers"),
    pytest.param(PRODUCER + CONSUMERS, False, 500, id="all slow"),
    pytest.param(CONSUMERS, True, 50, id="operands released early"),
]


@pytest.mark.parametrize(("slow", "early", "runs"), RACES)
def test_a_copy_for_races_sleeps_at_every_barrier(
    slow: tuple[str, ...], early: bool, runs: int, tmp_path: Path
) -> None:
    """What the test below relies on, checked where there is no GPU: the kernel still has the lines that are changed."""
    source = Path(str(delayed_kernel(tmp_path, slow, early=early).__file__)).read_text()
    barrier, sleep = r"^ +(?:mbarrier\.(?:wait|arrive|expect)|_load)\(", r"^ +_delay\(\d+\)\n"
    for function in re.split(r"(?=^@gluon\.jit\n)", source, flags=re.MULTILINE):
        name = re.match(r"@gluon\.jit\ndef (\w+)", function)
        sleeps = len(re.findall(sleep + barrier.replace("^", ""), function, re.MULTILINE))
        barriers = len(re.findall(barrier, function, re.MULTILINE))
        assert sleeps == (barriers if name and name[1] in slow else 0)
    assert source.count("_delay(99)") == early
    assert runs


@pytest.mark.gpu
@needs_specialization
@pytest.mark.parametrize("tiles", TILES)
@pytest.mark.parametrize(("slow", "early", "runs"), RACES)
def test_delays_at_barriers_change_no_bit_unless_a_wait_is_missing(
    slow: tuple[str, ...],
    early: bool,
    runs: int,
    tiles: str,
    tmp_path: Path,
    make_case: Callable[..., Any],
    device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Hundreds of forwards with sleeps at the barriers of one side; the planted race must show in fifty."""
    from quarkconv.kernels.jit import specialized

    case = make_case(700, 1024, 384, 12, 4)
    expected = forward(case, LaunchOptions(RowBlocks(16), PORTABLE, PORTABLE), device)
    arguments = check_arguments(*case.tensors())
    options = fit_options(LaunchOptions(RowBlocks(128, 32, 64), *TILES[tiles]), 1024, 384, device_traits(device))
    kernel = delayed_kernel(tmp_path, slow, early=early).specialized_product_kernel
    monkeypatch.setattr(specialized, "specialized_product_kernel", kernel)
    differing = torch.zeros((), dtype=torch.int64, device=device)
    for _ in range(runs):
        differing += (run_pipeline(arguments, torch.empty_like(expected), options) != expected).any()
    assert (differing.item() > 0) == early
