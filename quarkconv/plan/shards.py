"""How output tensors are laid out: which go into one file, in which order, behind which header.

safetensors allows no gap between tensors, so alignment comes from order: inside a file the tensors whose size is
divisible by the largest power of two come first. Every tensor then starts at a multiple of its own power of two, up to
a page, and so at least at a multiple of its element size. Expert tensors are multiples of a page in all real models;
they start on a page, as direct I/O and memory maps to a GPU need. The header is padded so that the data starts on a
page too.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Final

from quarkconv.errors import UnsupportedError
from quarkconv.plan.pieces import OutputShard, OutputTensor

PAGE: Final = 4096
_DIGITS: Final = re.compile(r"(\d+)")


def natural_key(name: str) -> list[tuple[int, str]]:
    """Sort key that puts layer 2 before layer 10."""
    return [(int(part[:18]), part) if part.isdecimal() else (-1, part) for part in _DIGITS.split(name)]


def in_natural_order(tensors: Iterable[OutputTensor]) -> list[OutputTensor]:
    """The tensors of an output by name, layer 2 before layer 10.

    Raises:
        UnsupportedError: two have the same name.
    """
    ordered = sorted(tensors, key=lambda tensor: natural_key(tensor.name))
    for first, second in pairwise(ordered):
        if first.name == second.name:
            raise UnsupportedError(
                "The source already has a tensor with a name that the target uses",
                tensor=first.name,
                hint="the checkpoint is partly converted; start from the original",
            )
    return ordered


def pack_shards(tensors: Iterable[OutputTensor], max_shard_size: int) -> tuple[OutputShard, ...]:
    """Distribute tensors over files in the order given, each filled up to ``max_shard_size`` bytes of data.

    A tensor larger than that has a file of its own. The files are named as huggingface_hub names them.
    """
    groups: list[list[OutputTensor]] = []
    filled = 0
    for tensor in tensors:
        nbytes = tensor.nbytes
        if not groups or filled + nbytes > max_shard_size:
            groups.append([])
            filled = 0
        groups[-1].append(tensor)
        filled += nbytes
    total = len(groups)
    return tuple(
        _shard(f"model-{number:05d}-of-{total:05d}.safetensors", group) for number, group in enumerate(groups, start=1)
    )


def encode_header(tensors: Sequence[OutputTensor]) -> bytes:
    """The length prefix and the padded JSON header of a file that holds ``tensors`` in this order."""
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    position = 0
    for tensor in tensors:
        end = position + tensor.nbytes
        entries[tensor.name] = {"dtype": tensor.dtype, "shape": tensor.shape, "data_offsets": (position, end)}
        position = end
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    padded = text + b" " * (-(8 + len(text)) % PAGE)
    return struct.pack("<Q", len(padded)) + padded


def _shard(file: str, group: list[OutputTensor]) -> OutputShard:
    ordered = tuple(sorted(group, key=lambda tensor: -_alignment(tensor.nbytes)))
    return OutputShard(file, len(encode_header(ordered)), ordered)


def _alignment(nbytes: int) -> int:
    """The largest power of two, up to a page, that divides a size."""
    return min(nbytes & -nbytes, PAGE) if nbytes else PAGE
