"""The public forward of the INT8 experts, and its torch twin: one signature, that of `check_arguments`."""

import inspect
from collections.abc import Callable
from typing import Any, ParamSpec

import torch

from .arguments import ExpertsArguments, check_arguments
from .custom_op import fused_experts_int8_op
from .forward import run_forward
from .reference import run_reference

P = ParamSpec("P")


def _with_signature_of(
    check: Callable[P, ExpertsArguments],
) -> Callable[[Callable[..., torch.Tensor]], Callable[P, torch.Tensor]]:
    """Give an operation the signature of the check of its arguments."""

    def decorate(operation: Callable[..., torch.Tensor]) -> Callable[P, torch.Tensor]:
        signature = inspect.signature(check).replace(return_annotation=torch.Tensor)
        operation.__signature__ = signature  # type: ignore[attr-defined]
        operation.__annotations__ = {**check.__annotations__, "return": torch.Tensor}
        return operation

    return decorate


@_with_signature_of(check_arguments)
def fused_experts_int8(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Mixture-of-experts forward with int8 weights and int8 activations; `check_arguments` describes the arguments.

    For token t with experts e_j = topk_ids[t, j] and router weights r_j = topk_weights[t, j]:

        h_j   = act(deq(q(x_t)) (w13[e_j, :I] * w13_scale)^T + b, deq(q(x_t)) (w13[e_j, I:] * w13_scale)^T + b)
        y_j   = deq(q(h_j)) (w2[e_j] * w2_scale)^T + b
        out_t = sum_j r_j * y_j

    Products of codes accumulate exactly in int32; scales, biases, activation and the sum over j are float32. h_j and
    y_j are rounded to the dtype of hidden_states, as inference engines do: it halves the traffic between the launches.
    The rounding of h_j, at most 2^-8 of a value, is within the half step of the int8 quantization that follows, even
    for the largest value of a row. The order of every sum is fixed: the same inputs give the same bits, whatever the
    other tokens of the batch are.

    Returns [M, H] in the dtype of hidden_states. A token that holds a NaN or an infinity gets a row of NaN; no other
    token is affected. So does a token whose h_j leaves the range of float16. A token without an expert on this rank
    gets 0.

    CUDA, ROCm and XPU tensors run the Triton kernels, without synchronization and with allocations that depend on
    shapes only (capture in a CUDA graph after one warm-up call). On NVIDIA a call with the shapes of an earlier one
    repeats its launches (`forward`). CPU tensors run the torch twin, or the kernels in Triton's interpreter under
    TRITON_INTERPRET=1. torch.compile and torch.export see one operator (`custom_op`).

    Raises TypeError for a wrong dtype and ValueError for a wrong shape, device, layout or activation.
    """
    if torch.compiler.is_compiling():
        out = kwargs.pop("out", None)
        result = fused_experts_int8_op(*args, **kwargs)
        return out.copy_(result) if isinstance(out, torch.Tensor) else result
    return run_forward(*args, **kwargs)


@_with_signature_of(check_arguments)
def fused_experts_int8_reference(*args: Any, **kwargs: Any) -> torch.Tensor:
    """Torch twin of `fused_experts_int8`, with its arguments, result and errors, on any device."""
    arguments = check_arguments(*args, **kwargs)
    result = run_reference(arguments)
    return result if arguments.out is None else arguments.out.copy_(result)
