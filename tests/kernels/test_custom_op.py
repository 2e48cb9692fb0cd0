"""The forward under torch.compile and torch.export: one operator, with shapes that are known without running it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quarkconv.kernels import fused_experts_int8
from quarkconv.kernels.custom_op import fused_experts_int8_op

SHAPE = (5, 96, 80, 4, 2)


def options(device: torch.device) -> dict[str, Any]:
    g = torch.Generator().manual_seed(3)
    return {
        "activation": "swigluoai",
        "activation_limit": 5.0,
        "w13_bias": torch.randn(4, 160, generator=g).to(device),
        "w2_bias": torch.randn(4, 96, generator=g).to(device),
        "apply_router_weight_on_input": True,
    }


@pytest.fixture(autouse=True)
def _torch_path_without_a_gpu(monkeypatch: pytest.MonkeyPatch, device: torch.device) -> None:
    """torch.compile cannot trace the interpreter; what runs behind the operator is tested elsewhere."""
    if device.type == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET", raising=False)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_operator_passes_opcheck(dtype: torch.dtype, make_case: Callable[..., Any], device: torch.device) -> None:
    case = make_case(*SHAPE, dtype=dtype)
    for more in ({}, options(device), {"w13_input_scale": torch.full((4,), 0.03, device=device)}):
        torch.library.opcheck(fused_experts_int8_op, case.tensors(), more)
    rows_apart = torch.zeros(5, 200, dtype=dtype, device=device)[:, 8:104]
    torch.library.opcheck(fused_experts_int8_op, case.replace(hidden_states=rows_apart).tensors())


def test_the_operator_has_the_signature_of_the_forward_without_out() -> None:
    names = [argument.name for argument in fused_experts_int8_op._opoverload._schema.arguments]
    assert names[:3] == ["hidden_states", "w13", "w2"]
    assert names[-1] == "apply_router_weight_on_input"
    assert "out" not in names


def test_wrong_arguments_are_named_while_tracing(make_case: Callable[..., Any]) -> None:
    case = make_case(*SHAPE)
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fakes: list[torch.Tensor] = [mode.from_tensor(tensor) for tensor in case.tensors()]
        assert fused_experts_int8_op(*fakes).shape == (5, 96)
        fakes[1] = fakes[1][:, :-1]
        with pytest.raises(ValueError, match="w13: expected"):
            fused_experts_int8_op(*fakes)


class Layer(torch.nn.Module):
    """A layer around the forward, as an engine would have it."""

    w13: torch.Tensor
    w2: torch.Tensor
    w13_scale: torch.Tensor
    w2_scale: torch.Tensor

    def __init__(self, case: Any) -> None:
        super().__init__()
        for name in ("w13", "w2", "w13_scale", "w2_scale"):
            self.register_buffer(name, getattr(case, name))

    def forward(self, x: torch.Tensor, topk_weights: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
        y = fused_experts_int8(x * 2, self.w13, self.w2, self.w13_scale, self.w2_scale, topk_weights, topk_ids)
        return x + y


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.filterwarnings("ignore:Guards may run slower on Python 3.13.0:RuntimeWarning")
def test_it_compiles_without_a_graph_break_for_any_number_of_tokens(make_case: Callable[..., Any]) -> None:
    case = make_case(*SHAPE)
    layer = Layer(case)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for tokens in (5, 9, 2):
        other = make_case(tokens, *SHAPE[1:], seed=tokens)
        inputs = (other.hidden_states, other.topk_weights, other.topk_ids)
        assert torch.equal(compiled(*inputs), layer(*inputs))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_it_exports_for_any_number_of_tokens(make_case: Callable[..., Any]) -> None:
    case = make_case(*SHAPE)
    layer, inputs = Layer(case), (case.hidden_states, case.topk_weights, case.topk_ids)
    tokens = torch.export.Dim("tokens", min=2, max=4096)
    shapes = {name: {0: tokens} for name in ("x", "topk_weights", "topk_ids")}
    exported = torch.export.export(layer, inputs, dynamic_shapes=shapes)
    assert "quarkconv.fused_experts_int8" in str(exported.graph)
    assert torch.equal(exported.module()(*inputs), layer(*inputs))


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
def test_inductor_gives_the_same_bits(make_case: Callable[..., Any]) -> None:
    case = make_case(64, 256, 128, 8, 2)
    layer, inputs = Layer(case), (case.hidden_states, case.topk_weights, case.topk_ids)
    assert torch.equal(torch.compile(layer, fullgraph=True)(*inputs), layer(*inputs))
