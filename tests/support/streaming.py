"""Checkpoints of any size, written as a stream: with random data, or with holes that take no space on the disk."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Final

from support.moe_model import INDEX, Content, MoeModel, TensorSpec, shard_name

SHARD_BYTES: Final = 5 * 10**9
_POOL_BYTES: Final = 2**26
_SMALL: Final = bytes((byte & 0x80) | 0x3E | (byte & 1) for byte in range(256))
"""Upper byte of a BF16 -> that of a number between 2^-3 and 2 with the same sign: random bytes may be NaN."""
_SYMMETRIC: Final = bytes(max(byte, 0x81) if byte >= 0x80 else byte for byte in range(256))
"""Int8 -> the same, but -127 for -128, which symmetric quantization never gives."""
_CONSTANTS: Final = {
    ("F32", Content.SCALES): struct.pack("<f", 2.0**-7), ("F32", Content.INPUT_SCALES): struct.pack("<f", 2.0**-7),
    ("BF16", Content.SCALES): b"\x00\x3c", ("BF16", Content.ONES): b"\x80\x3f", ("I8", Content.ZEROS): b"\0",
}  # fmt: skip
"""What a tensor repeats, by dtype and content."""


def write_streamed(folder: Path, model: MoeModel, *, data: bool, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a checkpoint, its tensors spread over shards in the order of their names.

    Args:
        folder: to create.
        model: what to write.
        data: False leaves holes where data belongs: files of full size that take no space.
        shard_bytes: data of a shard at most, unless one tensor has more.

    Returns:
        How many tensors it has.
    """
    folder.mkdir(parents=True)
    tensors = dict(sorted(model.tensors().items()))
    shards = list(_shards(tensors, shard_bytes))
    source = _Source() if data else None
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = shard_name(number, len(shards))
        weight_map.update(dict.fromkeys(names, file))
        with open(folder / file, "wb") as handle:
            _write_shard(handle, {name: tensors[name] for name in names}, source)
    total = sum(spec.nbytes for spec in tensors.values())
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(model.config()))
    return len(tensors)


def _shards(tensors: dict[str, TensorSpec], limit: int) -> Iterator[list[str]]:
    """Names in turn, as many as fit."""
    names: list[str] = []
    filled = 0
    for name, spec in tensors.items():
        if names and filled + spec.nbytes > limit:
            yield names
            names, filled = [], 0
        names.append(name)
        filled += spec.nbytes
    yield names


def _write_shard(handle: BinaryIO, tensors: dict[str, TensorSpec], source: _Source | None) -> None:
    header, position = {}, 0
    for name, spec in tensors.items():
        end = position + spec.nbytes
        header[name] = {"dtype": spec.dtype, "shape": spec.shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    handle.write(struct.pack("<Q", len(text)) + text)
    if source is None:
        handle.truncate(8 + len(text) + position)
        return
    for spec in tensors.values():
        handle.writelines(source.blocks(spec))


class _Source:
    """Data for tensors: slices of random bytes, or a number again and again."""

    def __init__(self) -> None:
        self._random = random.Random(0)
        codes = self._random.randbytes(_POOL_BYTES)
        noise = bytearray(codes)
        noise[1::2] = noise[1::2].translate(_SMALL)
        self._pools = {Content.CODES: memoryview(codes.translate(_SYMMETRIC)), Content.NOISE: memoryview(bytes(noise))}

    def blocks(self, spec: TensorSpec) -> Iterable[bytes | memoryview]:
        """The data of a tensor."""
        if (spec.dtype, spec.content) in _CONSTANTS:
            number = _CONSTANTS[spec.dtype, spec.content]
            yield number * (spec.nbytes // len(number))
            return
        pool, left = self._pools[spec.content], spec.nbytes
        while left:
            start = 2 * self._random.randrange(_POOL_BYTES // 4)
            block = pool[start : start + left]
            yield block
            left -= len(block)
