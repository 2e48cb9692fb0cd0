"""Checks that need a GPU: CUDA graphs and real sizes. The other modules run compiled, too, where there is one."""

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import pytest
import torch

from quarkconv.kernels import fused_experts_int8, fused_experts_int8_reference, quantize_int8, quantize_int8_reference
from quarkconv.kernels.arguments import check_arguments
from quarkconv.kernels.backend import device_traits
from quarkconv.kernels.launch.quantize import quantize_rows, quantize_rows_reference
from quarkconv.kernels.options import fit_options, specialized_tiles
from quarkconv.kernels.pipeline import run_pipeline
from quarkconv.kernels.tables import GemvOptions, LaunchOptions, RowBlocks, TileOptions, VectorTile, load_table

pytestmark = pytest.mark.gpu

# M, H, I, E, K: decode and prefill at (about) the sizes of Mixtral-8x7B and Qwen3-30B-A3B, and an odd one.
LARGE = {
    "mixtral-decode": (3, 4096, 14336, 4, 2),
    "mixtral-prefill": (300, 4096, 3584, 8, 2),
    "qwen3-decode": (16, 2048, 768, 128, 8),
    "qwen3-prefill": (1024, 2048, 768, 128, 8),
    "odd": (517, 1408, 176, 60, 6),
}


def relative_rms(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_real_sizes_are_within_rounding_of_the_twin(shape: Any, make_case: Callable[..., Any]) -> None:
    case = make_case(*shape)
    out = torch.full_like(case.hidden_states, math.nan)
    fused_experts_int8(*case.tensors(), out=out)
    assert relative_rms(out, fused_experts_int8_reference(*case.tensors())) < 0.01
    again = fused_experts_int8(*case.tensors())
    assert torch.equal(out, again)


LISTED = sorted({o for entries in load_table("NVIDIA H200").values() for o in entries.values()}, key=repr)


@pytest.mark.parametrize("listed", LISTED, ids=range(len(LISTED)))
def test_listed_options_give_the_same_bits(listed: Any, make_case: Callable[..., Any], device: torch.device) -> None:
    """Every entry of the table, on experts with rows for whole blocks, tails and short blocks, at an odd size."""
    case = make_case(601, 1040, 560, 6, 2)
    case.topk_ids[:290] = torch.tensor([0, 1])
    case.topk_ids[290:296] = torch.tensor([2, -1])
    arguments = check_arguments(*case.tensors())
    out, expected = (torch.full_like(case.hidden_states, math.nan) for _ in range(2))
    run_pipeline(arguments, out, fit_options(listed, 1040, 560, device_traits(device)))
    tile = TileOptions(64, 64, 1, 4, 2, descriptors=False)
    run_pipeline(arguments, expected, LaunchOptions(RowBlocks(16), tile, tile))
    assert expected.isfinite().all()
    assert torch.equal(out, expected)


PLAIN = TileOptions(64, 128, 4, 4, 3)
LAUNCHES = {
    "gemv": GemvOptions(VectorTile(1, 1), VectorTile(1, 1)),
    "portable": LaunchOptions(RowBlocks(16), PLAIN, PLAIN),
    "pointers": LaunchOptions(RowBlocks(16), *[replace(PLAIN, descriptors=False)] * 2),
    "specialized": LaunchOptions(RowBlocks(16, 16), *specialized_tiles(4)[0]),
}


@pytest.mark.parametrize("launch", LAUNCHES.values(), ids=LAUNCHES)
def test_offsets_past_2_to_the_31_do_not_wrap(launch: Any, make_case: Callable[..., Any], device: torch.device) -> None:
    """Weights of more than 2^31 codes: the last expert's rows lie where a 32-bit offset would wrap."""
    case = make_case(4, 4096, 4096, 70, 1)
    assert case.w13.numel() > 2**31
    case.topk_ids.copy_(torch.tensor([[69], [0], [68], [69]]))
    last = case.replace(
        w13=case.w13[68:],
        w2=case.w2[68:],
        w13_scale=case.w13_scale[68:],
        w2_scale=case.w2_scale[68:],
        topk_ids=torch.where(case.topk_ids >= 68, case.topk_ids - 68, -1).to(torch.int32),
    )
    launch = fit_options(launch, 4096, 4096, device_traits(device))
    arguments, out = check_arguments(*case.tensors()), torch.full_like(case.hidden_states, math.nan)
    run_pipeline(arguments, out, launch)
    expected = fused_experts_int8(*last.tensors())
    assert torch.equal(out[[0, 2, 3]], expected[[0, 2, 3]])
    assert relative_rms(out, fused_experts_int8_reference(*case.tensors())) < 0.01


@pytest.mark.parametrize("launch", [LAUNCHES["portable"], LAUNCHES["specialized"]], ids=["portable", "specialized"])
def test_results_past_2_to_the_31_do_not_wrap(launch: Any, make_case: Callable[..., Any], device: torch.device) -> None:
    """More than 2^31 values of y, and as many codes in sorted order: every token is as if it were alone."""
    case = make_case(2**16 + 3, 4160, 64, 16, 8)
    assert case.topk_ids.numel() * 4160 > 2**31
    out = torch.full_like(case.hidden_states, math.nan)
    launch = fit_options(launch, 4160, 64, device_traits(device))
    run_pipeline(check_arguments(*case.tensors()), out, launch)
    some = torch.tensor([0, 2**15, 2**16 - 1, 2**16 + 2], device=device)
    few = case.replace(**{n: getattr(case, n)[some] for n in ("hidden_states", "topk_weights", "topk_ids")})
    assert torch.equal(out[some], fused_experts_int8(*few.tensors()))
    assert out.isfinite().all()


def capture(run: Callable[[], object]) -> torch.cuda.CUDAGraph:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # compiles the kernels
        run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph


@pytest.mark.parametrize("tokens", [1, 7, 256])
@pytest.mark.parametrize("static", [False, True])
def test_a_graph_replays_with_other_inputs_and_routings(
    tokens: int, static: bool, make_case: Callable[..., Any], device: torch.device
) -> None:
    case = make_case(tokens, 512, 352, 16, 4)
    scale = torch.linspace(0.02, 0.04, 16, device=device)
    options: dict[str, Any] = {"w13_input_scale": scale, "w2_input_scale": scale} if static else {}
    out = torch.empty_like(case.hidden_states)
    graph = capture(lambda: fused_experts_int8(*case.tensors(), out=out, **options))
    for seed in range(1, 5):
        other = make_case(tokens, 512, 352, 16, 4, seed=seed)
        for name in ("hidden_states", "topk_weights", "topk_ids"):
            getattr(case, name).copy_(getattr(other, name))
        if seed == 2:
            case.topk_ids.fill_(5)  # one expert takes all: the most uneven load
        if seed == 3:
            case.topk_ids.fill_(-1)
        out.fill_(math.nan)
        graph.replay()
        assert torch.equal(out, fused_experts_int8(*case.tensors(), **options))
        if seed == 3:
            assert (out == 0).all()


def test_a_graph_captures_the_quantization(device: torch.device) -> None:
    x = torch.randn(64, 2048, device=device, dtype=torch.bfloat16)
    names: tuple[Literal["per_token", "per_tensor"], ...] = ("per_token", "per_tensor")
    for granularity in names:
        found: list[torch.Tensor] = []

        def run(
            granularity: Literal["per_token", "per_tensor"] = granularity, found: list[torch.Tensor] = found
        ) -> None:
            found[:] = quantize_int8(x, granularity=granularity)

        graph = capture(run)
        x.normal_()
        graph.replay()
        for got, expected in zip(found, quantize_int8_reference(x, granularity=granularity), strict=True):
            assert torch.equal(got, expected)


def test_quantization_equals_the_twin_on_the_cpu(device: torch.device) -> None:
    """Bit for bit, over 4 million values: the divisions round the same way here and there."""
    x = torch.randn(1024, 4096, device=device, dtype=torch.bfloat16) * 3
    for granularity in ("per_token", "per_tensor"):
        codes, scales = quantize_int8(x, granularity=granularity)
        twin_codes, twin_scales = quantize_int8_reference(x.cpu(), granularity=granularity)
        assert torch.equal(codes.cpu(), twin_codes)
        assert torch.equal(scales.cpu(), twin_scales)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_refined_quotients_are_the_divisions(dtype: torch.dtype, device: torch.device) -> None:
    """Every mantissa of a row's largest value, against every value below it down to where all codes are 0."""
    values = torch.arange(0x7C00, dtype=torch.int32, device=device).to(torch.int16).view(dtype)
    below = values[(values.float() >= 2**-9) & (values.float() < 2)]
    for largest in values[(values.float() >= 1) & (values.float() < 2)].split(128):
        x = torch.minimum(below[None, :], largest[:, None])
        x = torch.cat([x, -x, largest[:, None]], dim=1)
        for found, expected in zip(quantize_rows(x), quantize_rows_reference(x), strict=True):
            assert torch.equal(found, expected)
