"""Compiles what later forwards launch, so that none of them waits for a compiler.

The number of tokens decides which kernels a forward launches, and with which constants: through the launch options, and
through the cuts of the small kernels. One forward of each kind compiles them all; Triton keeps them on disk.
"""

import dataclasses
from collections.abc import Hashable

import torch

from .arguments import ExpertsArguments
from .backend import device_traits, uses_triton
from .forward import run_checked
from .launch.grouped_gemv import can_pack
from .launch.quantize import row_constants
from .launch.routing import route_constants
from .options import choose_launch_options
from .pipeline import takes_sorted_rows
from .tables import GemvOptions

_EVERY = 1024  # up to so many tokens every count is looked at, beyond them every `_STEP`th
_STEP = 16


def warm_up(arguments: ExpertsArguments, most_tokens: int) -> list[int]:
    """Compile every kernel that forwards like `arguments` with 1 to `most_tokens` tokens launch.

    Runs one forward of each kind with the weights, scales and dtypes of `arguments`, on zeros; returns the numbers of
    tokens, ascending. Nothing runs on a CPU, which compiles nothing.
    """
    device = arguments.hidden_states.device
    if not uses_triton(device) or device.type == "cpu":
        return []
    counts = token_counts(arguments, most_tokens)
    hidden = arguments.hidden_states.new_zeros((max(counts), arguments.hidden))
    pairs = torch.arange(max(counts) * arguments.top_k, device=device).reshape(-1, arguments.top_k)
    ids = (pairs % arguments.experts).to(arguments.topk_ids.dtype)
    weights = arguments.topk_weights.new_zeros(ids.shape)
    for count in counts:
        x, chosen, routed = hidden[:count], ids[:count], weights[:count]
        run_checked(dataclasses.replace(arguments, hidden_states=x, topk_ids=chosen, topk_weights=routed, out=None))
    return counts


def token_counts(arguments: ExpertsArguments, most_tokens: int) -> list[int]:
    """The least numbers of tokens, ascending, of which each launches kernels that none before it does."""
    counts: dict[Hashable, int] = {}
    for tokens in (*range(1, min(most_tokens, _EVERY) + 1), *range(_EVERY + _STEP, most_tokens + 1, _STEP)):
        counts.setdefault(launch_key(arguments, tokens), tokens)
    return sorted(counts.values())


def launch_key(arguments: ExpertsArguments, tokens: int) -> Hashable:
    """What the constants of all kernels of a forward of `tokens` tokens follow from, beside `arguments`."""
    pairs, packed = tokens * arguments.top_k, can_pack(arguments.gate_up) and can_pack(arguments.down)
    sizes = (arguments.experts, arguments.top_k, arguments.hidden, arguments.intermediate)
    traits = device_traits(arguments.hidden_states.device)
    options = choose_launch_options(tokens, *sizes, traits, packed=packed)
    copied = takes_sorted_rows(arguments, options)
    static = arguments.gate_up_input_scale is not None
    inputs = row_constants(pairs if static else tokens, arguments.hidden, copied=copied)
    hidden = row_constants(pairs, arguments.intermediate)
    routing = None if isinstance(options, GemvOptions) else route_constants(pairs)
    return options, *inputs.values(), *hidden.values(), routing
