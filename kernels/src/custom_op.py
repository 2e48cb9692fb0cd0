"""`torch.ops.quarkconv.fused_experts_int8`: the forward as one opaque operator for torch.compile and torch.export.

Eager calls do not pass through it: its dispatch costs more than the launches of one token. It has no `out`, and no
gradient.
"""

import inspect

import torch

from .arguments import ExpertsArguments, check_arguments
from .backend import uses_triton
from .reference import run_reference

_PARAMETERS = inspect.signature(check_arguments).parameters
# Operators of torch take no tensors by keyword alone.
_SIGNATURE = inspect.Signature(
    [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in _PARAMETERS.values() if p.name != "out"],
    return_annotation=torch.Tensor,
)


def run_checked(arguments: ExpertsArguments) -> torch.Tensor:
    """The forward of checked arguments by the Triton kernels or the torch twin, as the device has it."""
    if not uses_triton(arguments.hidden_states.device) or arguments.pairs == 0:
        result = run_reference(arguments)
        return result if arguments.out is None else arguments.out.copy_(result)
    from .pipeline import run_pipeline

    return run_pipeline(arguments, _empty(arguments) if arguments.out is None else arguments.out)


def _empty(arguments: ExpertsArguments) -> torch.Tensor:
    return torch.empty_like(arguments.hidden_states, memory_format=torch.contiguous_format)


def _checked(*args: object, **kwargs: object) -> ExpertsArguments:
    return check_arguments(**_SIGNATURE.bind(*args, **kwargs).arguments)


def _forward(*args: object, **kwargs: object) -> torch.Tensor:
    return run_checked(_checked(*args, **kwargs))


def _fake(*args: object, **kwargs: object) -> torch.Tensor:
    return _empty(_checked(*args, **kwargs))


_forward.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
fused_experts_int8_op = torch.library.custom_op(
    "quarkconv::fused_experts_int8",
    _forward,
    mutates_args=(),
    schema=torch.library.infer_schema(_forward, mutates_args=()),
    tags=(torch.Tag.needs_fixed_stride_order,),
)
fused_experts_int8_op.register_fake(_fake)
