"""Kernels for the element-wise parts of a decoder layer, against what torch and transformers run in their place."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quarkconv import evaluate_checkpoint
from quarkconv.evaluate import (
    float_experts,
    int8,
    int8_product,
    layer_kernels,  # noqa: F401 - while tests are collected, Triton is imported for its interpreter
    layer_ops,
    norms,
    rotary,
    runners,
    sums,
    top_k,
)
from quarkconv.evaluate.int8 import Int8Linear
from quarkconv.evaluate.skeleton import Skeleton
from quarkconv.kernels import fused_experts_int8, quantize_int8
from quarkconv.kernels.jit import grouped_gemm, routing  # noqa: F401 - the same

DEVICES = ["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)]
DTYPES = [torch.bfloat16, torch.float32]


@pytest.fixture
def at(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where tensors go: to a GPU, or to Triton's interpreter."""
    if request.param != "interpreter":
        return str(request.param)
    if torch.cuda.is_available():
        pytest.skip("kernels are compiled where there is a GPU")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(layer_ops, "_BLOCK", 64)
    return "cpu"


def floats(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_scaled_sums_have_torchs_bits(at: str, biased: bool, dtype: torch.dtype) -> None:
    sums = torch.randint(-(2**24), 2**24, (5, 133), generator=torch.Generator().manual_seed(2), dtype=torch.int32)
    rows, columns = floats(5).exp() * 1e-3, floats(133, seed=3).exp() * 1e-3
    bias = floats(133, seed=4).to(torch.bfloat16) if biased else None
    expected = sums * rows[:, None] * columns
    expected = (expected if bias is None else expected + bias.float()).to(dtype)
    found = layer_ops.scale_sums(sums.to(at), rows.to(at), columns.to(at), None if bias is None else bias.to(at), dtype)
    assert torch.equal(found.cpu(), expected)


@pytest.mark.parametrize("shape", [(6,), (3, 2)])
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_every_code_is_dequantized_to_torchs_bits(at: str, shape: tuple[int, ...]) -> None:
    codes = torch.arange(-128, 133).to(torch.int8).expand(*shape, -1).contiguous()
    # Triton's interpreter converts float32 below the normal numbers wrongly to bfloat16.
    small = (3e-39, 1e-40) if at == "cuda" else (1e-35, 2e-38)
    scale = torch.tensor([1e-3, 2e36, 0.0, 0.0123456789, *small]).reshape(shape)
    expected = (codes.float() * scale.unsqueeze(-1)).bfloat16()
    assert expected.abs().max() > 1e38
    assert torch.equal(layer_ops.scale_codes(codes.to(at), scale.to(at)).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_a_norm_is_that_of_transformers_up_to_the_order_of_its_sum(at: str, dtype: torch.dtype) -> None:
    from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeRMSNorm

    states = (floats(4, 7, 200) * floats(4, 7, 1, seed=5).exp()).to(dtype)
    norm = Qwen3MoeRMSNorm(200, eps=1e-6)
    norm.weight.data = floats(200, seed=6).to(dtype)
    expected = norm(states).detach()
    found = layer_ops.rms_norm(states.to(at), norm.weight.data.to(at), 1e-6).cpu()
    step = torch.finfo(dtype).eps  # of the quotient; its product with the weight may round the other way as well
    assert torch.allclose(found.float(), expected.float(), rtol=2 * step, atol=0)
    assert (found != expected).float().mean() < 0.005


@pytest.mark.parametrize("weights_dtype", DTYPES)
@pytest.mark.parametrize("top_k", [1, 2, 6, 8, 11])
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_the_sum_of_experts_has_the_bits_of_transformers(at: str, top_k: int, weights_dtype: torch.dtype) -> None:
    """Of a GPU: torch sums in another order on CPUs, so there the order is written out."""
    tokens, hidden = 6, 130
    rows = floats(tokens * top_k, hidden).bfloat16()
    weights = floats(tokens, top_k, seed=7).softmax(-1).to(weights_dtype)
    places = torch.randperm(tokens * top_k, generator=torch.Generator().manual_seed(8))
    rows, weights, places = rows.to(at), weights.to(at), places.to(at)
    weighted = rows[places].view(tokens, top_k, hidden) * weights.unsqueeze(-1)
    if at == "cpu":
        parts = torch.zeros(4, tokens, hidden)
        for slot in range(top_k):
            parts[slot % 4] += weighted[:, slot]
        expected = (((parts[0] + parts[1]) + parts[2]) + parts[3]).bfloat16()
    else:
        expected = weighted.sum(1).bfloat16()
    assert torch.equal(layer_ops.sum_experts(rows, places, weights, torch.bfloat16), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("heads", "size", "rotated", "batches"), [(5, 16, 16, 2), (1, 24, 8, 1), (40, 128, 128, 1)])
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_rotated_states_have_torchs_bits(
    at: str, heads: int, size: int, rotated: int, batches: int, dtype: torch.dtype
) -> None:
    from transformers.models.glm4_moe.modeling_glm4_moe import apply_rotary_pos_emb

    rows = floats(2, 7, heads, size).to(dtype)  # as a projection writes them: tokens before heads
    cos, sin = floats(batches, 7, rotated, seed=10).cos().to(dtype), floats(batches, 7, rotated, seed=11).to(dtype)
    for states in (rows.transpose(1, 2), rows.transpose(1, 2).contiguous()):
        expected, _ = apply_rotary_pos_emb(states, states, cos, sin)
        assert torch.equal(layer_ops.rotate(states.to(at), cos.to(at), sin.to(at)).cpu(), expected)


@pytest.mark.filterwarnings("ignore:overflow encountered")  # numpy's, of the largest gates
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_gated_experts_have_torchs_bits(at: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """For every bfloat16 that is a number; Triton's interpreter loses those that are not normal."""
    monkeypatch.setattr(layer_ops, "_BLOCK", 256)  # two blocks a row, the second with a tail
    gates = torch.arange(2**16).to(torch.int16).view(torch.bfloat16)
    gates = gates[gates.isfinite()].reshape(-1, 510)
    ups = floats(*gates.shape, seed=12).bfloat16()
    compared = ((gates.abs() > 1e-30) & (gates.abs() < 80)) if at == "cpu" else torch.ones_like(gates, dtype=torch.bool)
    assert compared.sum() > 2**14
    gates, ups = gates.to(at), ups.to(at)
    found = layer_ops.silu_gate(torch.cat([gates, ups], 1)).cpu()
    expected = (torch.nn.functional.silu(gates) * ups).cpu()
    assert torch.equal(found[compared], expected[compared])


@pytest.mark.parametrize(
    ("kind", "fused"),
    [("qwen3_moe", True), ("glm4_moe", True), ("mixtral", True), ("ernie4_5_moe", False), ("gpt_oss", False)],
)
def test_the_rotation_is_replaced_where_it_has_these_bits_and_in_one_model_alone(kind: str, fused: bool) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        kind, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        intermediate_size=16, moe_intermediate_size=16, vocab_size=16, pad_token_id=0, eos_token_id=1, bos_token_id=1
    )  # fmt: skip
    model, other = (AutoModelForCausalLM.from_config(config) for _ in range(2))
    rotary.fuse_rotary(model)
    names = {name for name, module in model.named_modules() if "forward" in module.__dict__}
    assert names == ({"model.layers.0.self_attn"} if fused else set())
    assert not any("forward" in module.__dict__ for module in other.modules())
    module: Any = sys.modules[type(other).__module__]
    assert not isinstance(module.apply_rotary_pos_emb, rotary._Rotation)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "columns", "depth"), [(5, 133, 64), (300, 256, 144), (1, 16, 48)])
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_a_linear_as_one_expert_has_the_bits_of_scaled_sums(
    at: str, rows: int, columns: int, depth: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator = torch.Generator().manual_seed(columns)
    codes, weight = (torch.randint(-127, 128, (n, depth), generator=generator).to(torch.int8) for n in (rows, columns))
    row_scale, scale = floats(rows).exp() * 1e-3, floats(columns, seed=3).exp() * 1e-3
    expected = ((codes.double() @ weight.double().T).int() * row_scale[:, None] * scale).to(dtype)
    monkeypatch.setattr(int8_product, "on_kernels", lambda _: True)
    if at == "cpu":
        monkeypatch.setattr(int8_product, "_runs_as_expert", lambda *_: True)
    found = int8_product.scaled_product(codes.to(at), row_scale.to(at), weight.to(at), scale.to(at), None, dtype)
    assert torch.equal(found.cpu(), expected)


def test_linears_that_share_rows_quantize_them_once(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs: list[Tensor] = []

    def quantized(states: Tensor) -> tuple[Tensor, Tensor]:
        inputs.append(states)
        return quantize_int8(states)

    monkeypatch.setattr(int8_product, "quantize_int8", quantized)
    weight, scale, rows = torch.ones(8, 16, dtype=torch.int8), torch.ones(8), int8_product.QuantizedRows()
    one, other = (Int8Linear(weight, scale, None, None, rows=rows) for _ in range(2))
    alone = Int8Linear(weight, scale, None, None)
    states = floats(2, 3, 16).bfloat16()
    first, second = states.clone(), states + 1
    assert torch.equal(one(first), alone(first))
    assert torch.equal(other(first), alone(first))
    assert len(inputs) == 2  # by the first of the two, and by the one alone
    assert torch.equal(other(second), alone(second))
    second.add_(1)
    assert torch.equal(one(second), alone(second))
    del second
    assert torch.equal(one(states), alone(states))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("choices", "count"), [(128, 8), (1, 1), (6, 6), (200, 3)])
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_the_largest_are_those_of_a_stable_sort(at: str, choices: int, count: int, dtype: torch.dtype) -> None:
    numbers = (floats(2, 37, choices) * 3).to(dtype)
    numbers[0, 0] = 0.25
    numbers[0, 1] = -torch.inf
    numbers[0, 2, -1] = torch.nan
    numbers[0, 3, : choices // 2] = -numbers[0, 3, : choices // 2].abs() - 100
    expected, places = numbers.sort(dim=-1, descending=True, stable=True)
    values, ids = layer_ops.largest(numbers.to(at), count)
    assert torch.equal(values.cpu().nan_to_num(1e4), expected[..., :count].nan_to_num(1e4))
    assert torch.equal(ids.cpu(), places[..., :count])


def test_routers_take_the_kernel_and_other_models_keep_torchs_function(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    config = Qwen3MoeConfig(
        hidden_size=16, intermediate_size=16, moe_intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_experts=6, num_experts_per_tok=2, vocab_size=32,
    )  # fmt: skip
    model, other = (AutoModelForCausalLM.from_config(config).eval() for _ in range(2))
    model.load_state_dict(other.state_dict())
    top_k.fuse_top_k(model)
    assert [name for name, module in model.named_modules() if "forward" in module.__dict__] == [
        "model.layers.0.mlp.gate"
    ]
    sizes: list[torch.Size] = []

    def largest(numbers: Tensor, count: int) -> tuple[Tensor, Tensor]:
        sizes.append(numbers.shape)
        return tuple(numbers.topk(count))  # type: ignore[return-value]

    monkeypatch.setattr(top_k, "on_kernels", lambda _: True)
    monkeypatch.setattr(layer_ops, "largest", largest)
    ids = torch.arange(10)[None]
    with torch.no_grad():
        assert torch.equal(model(ids).logits, other(ids).logits)
    assert sizes == [(10, 6)]


@pytest.mark.parametrize("options", [{"dim": 0}, {"largest": False}, {"k": 17}, {"out": None}])
def test_what_the_kernel_does_not_take_goes_to_torch(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(top_k, "on_kernels", lambda _: True)
    monkeypatch.setattr(layer_ops, "largest", lambda *_: pytest.fail("the kernel was called"))
    numbers, options = floats(20, 20), {"k": 3, **options}
    for found, expected in zip(top_k.top_k(numbers, **options), torch.topk(numbers, **options), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [None, torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_numbers_that_are_not_finite_are_found(
    at: str, bad: float | None, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_ops, "_FINITE_BLOCK", 64)
    states = torch.full((3, 5, 50), torch.finfo(dtype).max, dtype=dtype)
    if bad is not None:
        states[2, 4, 49] = bad
    assert bool(layer_ops.is_finite(states.to(at))) is (bad is None)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("at", DEVICES, indirect=True)
def test_compared_rows_have_the_sums_of_float64(at: str, dtype: torch.dtype) -> None:
    one, other = floats(2, 9, 150).to(dtype), floats(2, 9, 150, seed=9).to(dtype)
    wide = one.double(), other.double()
    expected = torch.stack([item.square().sum() for item in (wide[0] - wide[1], *wide)])
    assert torch.allclose(layer_ops.compare_rows(one.to(at), other.to(at)).cpu(), expected, rtol=1e-6)
    assert layer_ops.compare_rows(one.to(at), (other * torch.nan).to(at)).cpu().isnan().tolist() == [True, False, True]


@pytest.mark.parametrize("at", ["interpreter"], indirect=True)
def test_a_model_on_these_kernels_has_the_figures_of_torch(
    at: str, quantized: Path, unquantized: Path, token_ids: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Norms may round the other way, as between sizes of batches."""
    few = tmp_path / "ids.safetensors"
    save_file({"token_ids": load_file(token_ids)["token_ids"][:1, :12].contiguous()}, few)
    monkeypatch.setenv("TRITON_INTERPRET", "")
    expected = evaluate_checkpoint(quantized, unquantized, token_ids=few, device=at, resume=False)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setattr(layer_ops, "_BLOCK", 1024)
    used: set[str] = set()
    for module in (float_experts, int8_product, norms, rotary, sums, top_k):

        def here(_: Tensor, name: str = module.__name__) -> bool:
            used.add(name)
            return True

        monkeypatch.setattr(module, "on_kernels", here)

    def experts(*args: Any, **options: Any) -> Tensor:
        """In torch: interpreted, their kernels take minutes, and tests/kernels has them."""
        with pytest.MonkeyPatch.context() as plain:
            plain.setenv("TRITON_INTERPRET", "")
            return fused_experts_int8(*args, **options)

    monkeypatch.setattr(int8, "fused_experts_int8", experts)

    class Fused(Skeleton):
        def __init__(self, root: Path, device: torch.device, group: int | None) -> None:
            super().__init__(root, device, group)
            self.fuse()

    monkeypatch.setattr(runners, "Skeleton", Fused)
    found = evaluate_checkpoint(quantized, unquantized, token_ids=few, device=at, resume=False)
    assert len(used) == 6
    assert found.int8 is not None
    assert expected.int8 is not None
    assert found.int8.mean == pytest.approx(expected.int8.mean, rel=0.15)
    for layer, of_torch in zip(found.layers, expected.layers, strict=True):
        assert layer.own == pytest.approx(of_torch.own, rel=0.1)
        assert layer.load == of_torch.load
