"""One forward: by the launches of an earlier one like it, by the kernels as usual, or by the torch twin.

A call has a key: of each tensor the shape, strides, dtype, device and address modulo 16, which addresses are equal, and
the other arguments. Everything that a forward checks, chooses and launches follows from it, but for the addresses
themselves. So the first call of a key is checked and records its launches (`launch.prepared`), and every later one only
repeats them with its own addresses. Nothing is kept of a tensor: another one at a freed one's address has the same key
only where it is equal in all of this.
"""

import threading
from collections.abc import Hashable

import torch

from .arguments import ExpertsArguments, check_arguments
from .backend import device_traits, uses_triton
from .launch.prepared import PreparedLaunches, record
from .reference import run_reference

_PREPARED: dict[Hashable, PreparedLaunches | None] = {}
"""What each key repeats; None where its launches cannot be repeated."""
_MOST = 1024  # keys that are kept: a few kilobytes each, and one for each number of tokens
_LOCK = threading.Lock()

_UNKNOWN = object()

Tensors = tuple[torch.Tensor | None, ...]


def run_forward(*args: object, **kwargs: object) -> torch.Tensor:
    """`fused_experts_int8`, with the arguments of `check_arguments` and its errors."""
    tensors, others = _split(*args, **kwargs)  # type: ignore[arg-type]
    hidden_states = tensors[0]
    assert hidden_states is not None
    if not device_traits(hidden_states.device).direct_launch:
        return run_checked(check_arguments(*args, **kwargs))  # type: ignore[arg-type]
    out = tensors[-1]
    if out is None:
        out = kwargs["out"] = empty_result(hidden_states)
        tensors = (*tensors[:-1], out)
    key, addresses = _key_of(tensors, others)
    prepared = _PREPARED.get(key, _UNKNOWN)
    if isinstance(prepared, PreparedLaunches) and prepared.run(addresses):
        return out
    arguments = check_arguments(*args, **kwargs)  # type: ignore[arg-type]
    if prepared is not _UNKNOWN:
        return run_checked(arguments)
    with record() as recording:
        run_checked(arguments)
    try:
        prepared = PreparedLaunches(recording, tensors)
    except ValueError:
        prepared = None
    with _LOCK:
        if len(_PREPARED) >= _MOST:
            del _PREPARED[next(iter(_PREPARED))]
        _PREPARED[key] = prepared
    return out


def run_checked(arguments: ExpertsArguments) -> torch.Tensor:
    """The forward of checked arguments by the Triton kernels or the torch twin, as the device has it."""
    if not uses_triton(arguments.hidden_states.device) or arguments.pairs == 0:
        result = run_reference(arguments)
        return result if arguments.out is None else arguments.out.copy_(result)
    from .pipeline import run_pipeline

    return run_pipeline(arguments, empty_result(arguments.hidden_states) if arguments.out is None else arguments.out)


def empty_result(hidden_states: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(hidden_states, memory_format=torch.contiguous_format)


def _split(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    w13_scale: torch.Tensor,
    w2_scale: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activation: str = "silu",
    activation_limit: float | None = None,
    activation_alpha: float | None = None,
    w13_input_scale: torch.Tensor | None = None,
    w2_input_scale: torch.Tensor | None = None,
    w13_bias: torch.Tensor | None = None,
    w2_bias: torch.Tensor | None = None,
    apply_router_weight_on_input: bool = False,
    out: torch.Tensor | None = None,
) -> tuple[Tensors, tuple[object, ...]]:
    """(the tensors, hidden_states first and out last; the other arguments) of a call of `check_arguments`."""
    weights = (w13, w2, w13_scale, w2_scale, w13_input_scale, w2_input_scale, w13_bias, w2_bias)
    others = (activation, activation_limit, activation_alpha, apply_router_weight_on_input)
    return (hidden_states, *weights, topk_weights, topk_ids, out), others


def _key_of(tensors: Tensors, others: tuple[object, ...]) -> tuple[Hashable, list[int | None]]:
    """(the key of a call, the addresses of its tensors)"""
    key: list[Hashable] = [others]
    addresses: list[int | None] = []
    for tensor in tensors:
        if tensor is None:
            address = None
            key.append(None)
        else:
            address = tensor.data_ptr()
            key += (tensor.shape, tensor.stride(), tensor.dtype, tensor.get_device(), address % 16)
        addresses.append(address)
    key.append(tuple(map(addresses.index, addresses)))
    return tuple(key), addresses
