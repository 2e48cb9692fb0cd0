"""Every argument that is wrong is named, with what was expected and what was found."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quarkconv.kernels import fused_experts_int8, fused_experts_int8_reference
from quarkconv.kernels.arguments import MAX_DEPTH

WRONG = [
    (
        "hidden_states",
        lambda t: t.float(),
        TypeError,
        "hidden_states: expected .*bfloat16 or .*float16, found .*float32",
    ),
    ("hidden_states", lambda t: t[0], ValueError, r"hidden_states: expected 2 dimensions \[M, H\]"),
    ("hidden_states", lambda t: t.t().contiguous().t(), ValueError, "hidden_states: expected rows contiguous"),
    ("w13", lambda t: t.float(), TypeError, "w13: expected .*int8, found .*float32"),
    ("w13", lambda t: t[0], ValueError, "w13: expected 3 dimensions"),
    ("w13", lambda t: t[:, :-1].contiguous(), ValueError, "w13: expected .* 2I even"),
    ("w13", lambda t: t[:0], ValueError, "w13: expected .* none of them 0"),
    ("w13", lambda t: t[..., :-1].contiguous(), ValueError, r"w13: expected shape \(4, 160, 96\)"),
    ("w13", lambda t: t.transpose(1, 2).contiguous().transpose(1, 2), ValueError, "w13: expected a contiguous tensor"),
    ("w2", lambda t: t.transpose(1, 2).contiguous(), ValueError, r"w2: expected shape \(4, 96, 80\)"),
    ("w2", lambda t: t.to("meta"), ValueError, "w2: expected device .* found meta"),
    ("w13_scale", lambda t: t.half(), TypeError, "w13_scale: expected .*float32"),
    ("w13_scale", lambda t: t[:, :80].contiguous(), ValueError, r"w13_scale: expected \(4, 160, 1\) or \(4, 1, 1\)"),
    ("w2_scale", lambda t: t.squeeze(-1), ValueError, "w2_scale: expected 3 dimensions"),
    ("topk_weights", lambda t: t.bfloat16(), TypeError, "topk_weights: expected .*float32"),
    ("topk_weights", lambda t: t[:, :1].contiguous(), ValueError, r"topk_weights: expected shape \(3, 2\)"),
    ("topk_ids", lambda t: t.short(), TypeError, "topk_ids: expected .*int32 or .*int64"),
    ("topk_ids", lambda t: t[:2], ValueError, r"topk_ids: expected shape \(3, 2\)"),
    ("topk_ids", lambda t: t.t().contiguous().t(), ValueError, "topk_ids: expected a contiguous tensor"),
]


@pytest.mark.parametrize("implementation", [fused_experts_int8, fused_experts_int8_reference])
@pytest.mark.parametrize(("name", "change", "error", "message"), WRONG)
def test_a_wrong_tensor_is_refused(
    implementation: Callable[..., torch.Tensor],
    name: str,
    change: Callable[..., Any],
    error: type[Exception],
    message: str,
    make_case: Callable[..., Any],
) -> None:
    case = make_case(3, 96, 80, 4, 2)
    with pytest.raises(error, match=message):
        implementation(*case.replace(**{name: change(getattr(case, name))}).tensors())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"activation": "relu"}, ValueError, "activation: expected one of"),
        ({"activation": "gelu", "activation_limit": 7.0}, ValueError, "activation_limit: expected None"),
        ({"activation": "situ"}, ValueError, "activation_alpha: expected a number"),
        ({"activation": "relu2"}, ValueError, r"w2: expected shape \(4, 96, 160\)"),
        ({"activation": "swiglustep", "activation_limit": -1.0}, ValueError, "positive finite"),
        ({"w13_input_scale": torch.ones(1)}, ValueError, r"w13_input_scale: expected shape \(4,\)"),
        ({"w2_input_scale": torch.ones(4).half()}, TypeError, "w2_input_scale: expected .*float32"),
        ({"w13_bias": torch.ones(4, 80)}, ValueError, r"w13_bias: expected shape \(4, 160\)"),
        ({"w2_bias": torch.ones(4, 96, dtype=torch.int8)}, TypeError, "w2_bias: expected"),
        ({"out": torch.empty(3, 96)}, TypeError, "out: expected .*bfloat16, found .*float32"),
        ({"out": torch.empty(2, 96, dtype=torch.bfloat16)}, ValueError, r"out: expected shape \(3, 96\)"),
        ({"out": torch.empty(3, 192, dtype=torch.bfloat16)[:, ::2]}, ValueError, "out: expected a contiguous tensor"),
    ],
)
def test_a_wrong_option_is_refused(
    options: Any, error: type[Exception], message: str, make_case: Callable[..., Any], device: torch.device
) -> None:
    on_device: dict[str, Any] = {
        k: v.to(device) if isinstance(v, torch.Tensor) and v.is_contiguous() else v for k, v in options.items()
    }
    if "out" in options and not options["out"].is_contiguous():
        on_device["out"] = torch.empty(3, 192, dtype=torch.bfloat16, device=device)[:, ::2]
    with pytest.raises(error, match=message):
        fused_experts_int8(*make_case(3, 96, 80, 4, 2).tensors(), **on_device)


def test_a_depth_that_could_overflow_int32_is_refused(make_case: Callable[..., Any]) -> None:
    """Refused before anything is computed; the weights are views of one row, since the real ones would be large."""
    assert MAX_DEPTH * 127 * 128 < 2**31 <= (MAX_DEPTH + 1) * 127 * 128
    case = make_case(1, 8, 8, 1, 1)
    deep = case.replace(
        hidden_states=torch.zeros(1, MAX_DEPTH + 1, dtype=torch.bfloat16, device=case.w13.device),
        w13=torch.zeros(1, 2, MAX_DEPTH + 1, dtype=torch.int8, device=case.w13.device),
    )
    with pytest.raises(ValueError, match="int32 overflows"):
        fused_experts_int8(*deep.tensors())


def test_an_unsupported_device_is_refused(make_case: Callable[..., Any]) -> None:
    case = make_case(3, 96, 80, 4, 2)
    meta = case.replace(**{name: getattr(case, name).to("meta") for name in case.__dataclass_fields__})
    with pytest.raises(ValueError, match="unsupported device: expected cpu, cuda"):
        fused_experts_int8(*meta.tensors())
