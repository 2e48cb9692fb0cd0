"""Checks that need a GPU: CUDA graphs and real sizes. The other modules run compiled, too, where there is one."""

import math
from collections.abc import Callable

import pytest
import torch

from quarkconv.kernels import fused_experts_int8, fused_experts_int8_reference, quantize_int8, quantize_int8_reference

pytestmark = pytest.mark.gpu

# M, H, I, E, K: decode and prefill at (about) the sizes of Mixtral-8x7B and Qwen3-30B-A3B, and an odd one.
LARGE = {
    "mixtral-decode": (3, 4096, 14336, 4, 2),
    "mixtral-prefill": (300, 4096, 3584, 8, 2),
    "qwen3-decode": (16, 2048, 768, 128, 8),
    "qwen3-prefill": (1024, 2048, 768, 128, 8),
    "odd": (517, 1408, 176, 60, 6),
}


def relative_rms(found, expected):
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.mark.parametrize("shape", LARGE.values(), ids=LARGE)
def test_real_sizes(shape, make_case):
    case = make_case(*shape)
    out = torch.full_like(case.hidden_states, math.nan)
    fused_experts_int8(*case.tensors(), out=out)
    assert relative_rms(out, fused_experts_int8_reference(*case.tensors())) < 0.01
    again = fused_experts_int8(*case.tensors())
    assert torch.equal(out, again)


def test_offsets_past_2_to_the_31(make_case):
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
    out, expected = fused_experts_int8(*case.tensors()), fused_experts_int8(*last.tensors())
    assert torch.equal(out[[0, 2, 3]], expected[[0, 2, 3]])
    assert relative_rms(out, fused_experts_int8_reference(*case.tensors())) < 0.01


def capture(run: Callable[[], None]) -> torch.cuda.CUDAGraph:
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
def test_graph_replays_with_other_inputs_and_routings(tokens, static, make_case, device):
    case = make_case(tokens, 512, 352, 16, 4)
    scale = torch.linspace(0.02, 0.04, 16, device=device)
    options = {"w13_input_scale": scale, "w2_input_scale": scale} if static else {}
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


def test_graph_of_the_quantization(device):
    x = torch.randn(64, 2048, device=device, dtype=torch.bfloat16)
    for granularity in ("per_token", "per_tensor"):
        found: list[torch.Tensor] = []

        def run(granularity=granularity, found=found) -> None:
            found[:] = quantize_int8(x, granularity=granularity)

        graph = capture(run)
        x.normal_()
        graph.replay()
        for got, expected in zip(found, quantize_int8_reference(x, granularity=granularity), strict=True):
            assert torch.equal(got, expected)


def test_quantization_equals_the_twin_on_the_cpu(device):
    """Bit for bit, over 4 million values: the divisions round the same way here and there."""
    x = torch.randn(1024, 4096, device=device, dtype=torch.bfloat16) * 3
    for granularity in ("per_token", "per_tensor"):
        codes, scales = quantize_int8(x, granularity=granularity)
        twin_codes, twin_scales = quantize_int8_reference(x.cpu(), granularity=granularity)
        assert torch.equal(codes.cpu(), twin_codes)
        assert torch.equal(scales.cpu(), twin_scales)
