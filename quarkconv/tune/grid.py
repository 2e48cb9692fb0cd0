"""Tiles of the Triton kernel that vLLM and SGLang share, and which of them are worth timing.

Of 1,920 combinations, :func:`starts` keeps 4 to 22, and :func:`variations` adds up to 8 around the fastest. What is
dropped cannot be launched or repeats work:

- shared memory: ``num_stages`` tiles of both operands, one byte a code, must fit;
- registers: the int32 sums of a tile take at most 128 of the 255 registers of a thread;
- rows: a block of more than 2.5 times the mean rows of an expert multiplies padding, one of less than an eighth of them
  (and below 64 rows) reads the weights again and again;
- work: a thread of 8 warps needs 32 sums or more, so that products hide loads, and 64 rows or more need 128 columns;
- groups of row blocks share weights in L2 only where an expert has several blocks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any, Final

from quarkconv.tune.shapes import RankShape

_FIELDS: Final = {
    "BLOCK_SIZE_M": "block_m",
    "BLOCK_SIZE_N": "block_n",
    "BLOCK_SIZE_K": "block_k",
    "GROUP_SIZE_M": "group_m",
    "num_warps": "num_warps",
    "num_stages": "num_stages",
}
"""Key of an engine's table -> field."""
_TRITON_DEFAULTS: Final = {"num_warps": 4, "num_stages": 3}
"""Options that an engine's defaults may leave to Triton, and Triton's values on NVIDIA GPUs."""
_IGNORED: Final = {"SPLIT_K": 1}
"""Keys that some tables carry and the kernel fixes at this value."""
_COLUMNS: Final = {16: (64, 128), 32: (64, 128), 64: (128, 256), 128: (128, 256)}
"""Rows of a tile -> its columns."""
_DEPTHS: Final = {16: (128, 256), 32: (128, 256), 64: (64, 128), 128: (64, 128)}
"""Rows of a tile -> codes of the summed dimension that it loads at a time."""
_WARP: Final = 32
"""Threads of a warp of an NVIDIA GPU."""
_MOST_SUMS: Final = 128
_FEWEST_SUMS_OF_EIGHT_WARPS: Final = 32


@dataclass(frozen=True, slots=True)
class Tile:
    """Launch options of one forward.

    Attributes:
        block_m, block_n, block_k: rows, columns, and codes of the summed dimension that are loaded at a time.
        group_m: row blocks that are computed one after the other for the same columns.
        num_warps, num_stages: warps of a program, and loads that are under way at once.
    """

    block_m: int
    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int

    def to_json(self) -> dict[str, int]:
        """An entry of an engine's table."""
        return {key: getattr(self, field) for key, field in _FIELDS.items()}

    def shared_memory(self) -> int:
        """Bytes of shared memory that its loads take at once."""
        return self.num_stages * (self.block_m + self.block_n) * self.block_k

    def sums_of_a_thread(self) -> float:
        """int32 sums that each thread holds."""
        return self.block_m * self.block_n / (self.num_warps * _WARP)


def tile_of(entry: Mapping[str, Any]) -> Tile:
    """The tile of an entry of an engine's table, or of an engine's default.

    Raises:
        ValueError: a key is unknown, or missing, or its value is not a positive int.
    """
    values = {**_TRITON_DEFAULTS, **entry}
    if any(values.pop(key, value) != value for key, value in _IGNORED.items()) or set(values) != set(_FIELDS):
        raise ValueError(f"launch options: expected {', '.join(_FIELDS)}, found {dict(entry)!r}")
    if not all(type(value) is int and value > 0 for value in values.values()):
        raise ValueError(f"launch options: expected positive integers, found {dict(entry)!r}")
    return Tile(**{_FIELDS[key]: value for key, value in values.items()})


def starts(shape: RankShape, tokens: int, shared_memory: int) -> list[Tile]:
    """Tiles to start from: one for each size and number of warps, as many stages as fit, no groups of row blocks.

    Args:
        shape: the experts of the rank.
        tokens: tokens of a forward.
        shared_memory: bytes of shared memory that a program may take.
    """
    mean_rows = shape.mean_rows(tokens)
    least, most = min(mean_rows / 8, 64), max(2.5 * mean_rows, 16)
    heights = [rows for rows in _COLUMNS if least <= rows <= most]
    found = []
    for block_m in heights:
        for block_n, block_k, num_warps in product(_COLUMNS[block_m], _DEPTHS[block_m], (4, 8)):
            deep = [Tile(block_m, block_n, block_k, 1, num_warps, stages) for stages in (4, 3, 2)]
            found += [tile for tile in deep if _fits(tile, shape, shared_memory)][:1]
    return found


def variations(tile: Tile, shape: RankShape, tokens: int, shared_memory: int) -> list[Tile]:
    """The tile with other numbers of stages, and with groups of row blocks where an expert has several."""
    groups = (1, 4, 16) if shape.mean_rows(tokens) > tile.block_m else (1,)
    found = [replace(tile, group_m=group, num_stages=stages) for group, stages in product(groups, (3, 4, 5))]
    return [each for each in found if each != tile and _fits(each, shape, shared_memory)]


def _fits(tile: Tile, shape: RankShape, shared_memory: int) -> bool:
    sums = tile.sums_of_a_thread()
    return (
        tile.shared_memory() <= shared_memory
        and sums <= _MOST_SUMS
        and (tile.num_warps == 4 or sums >= _FEWEST_SUMS_OF_EIGHT_WARPS)
        and tile.block_n < 4 * shape.intermediate
        and tile.block_k < 2 * max(shape.hidden, shape.intermediate)
    )
