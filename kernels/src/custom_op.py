"""`torch.ops.quarkconv.fused_experts_int8`: the forward as one opaque operator for torch.compile and torch.export.

Eager calls do not pass through it: its dispatch costs more than the launches of one token. It has no `out`, and no
gradient.
"""

import inspect

import torch

from .arguments import check_arguments
from .forward import empty_result, run_forward

_PARAMETERS = inspect.signature(check_arguments).parameters
# Operators of torch take no tensors by keyword alone.
_SIGNATURE = inspect.Signature(
    [p.replace(kind=p.POSITIONAL_OR_KEYWORD) for p in _PARAMETERS.values() if p.name != "out"],
    return_annotation=torch.Tensor,
)


def _forward(*args: object, **kwargs: object) -> torch.Tensor:
    return run_forward(**_SIGNATURE.bind(*args, **kwargs).arguments)


def _fake(*args: object, **kwargs: object) -> torch.Tensor:
    return empty_result(check_arguments(**_SIGNATURE.bind(*args, **kwargs).arguments).hidden_states)


_forward.__signature__ = _SIGNATURE  # type: ignore[attr-defined]
fused_experts_int8_op = torch.library.custom_op(
    "quarkconv::fused_experts_int8",
    _forward,
    mutates_args=(),
    schema=torch.library.infer_schema(_forward, mutates_args=()),
    tags=(torch.Tag.needs_fixed_stride_order,),
)
fused_experts_int8_op.register_fake(_fake)
