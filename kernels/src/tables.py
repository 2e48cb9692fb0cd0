"""Tables of measured launch options: `tables/<device>.json` beside this file, one for each kind of device.

    {"device": "NVIDIA H200", "measured": {...},
     "shapes": [{"experts": 256, "top_k": 8, "hidden": 3072, "intermediate": 1536,
                 "tokens": {"1": {"gate_up": {...}, "down": {...}},
                            "8": {"blocks": {...}, "gate_up": {...}, "down": {...}}, ...}}]}

An entry with `blocks` is a `LaunchOptions`, one without a `GemvOptions`.

`python -m quarkconv.kernels.tune` writes one. An entry serves its shape from half of its tokens to twice as many.
"""

import functools
import json
import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

GROUP_WARPS = 4  # specialized warps that multiply together: one warpgroup
HALF = 64  # rows of weights in one wgmma; a warpgroup computes two halves: gate and up, or two runs of columns
FOLDER = Path(__file__).with_name("tables")
_REACH = 2  # an entry serves up to this many times more or fewer tokens


@dataclass(frozen=True, slots=True)
class TileOptions:
    """How one grouped product is tiled.

    block_n   output columns a program computes (for gate-up: of the gate and of the up half each)
    block_k   codes of the summed dimension loaded at a time
    group_m   row blocks walked before the next column tile, for reuse of the weights in cache
    num_warps, num_stages   Triton's warps per program and depth of the load pipeline
    descriptors   whether tiles are copied through tensor descriptors, where the device and the layout allow it
    specialized   whether warps are specialized (`jit.specialized`), where the device and the layout allow it: then
                  num_warps multiply at a time, 4 in ping-pong and 8 in cooperation; block_n is 16 times that for
                  gate-up and 32 times for down, block_k 128, num_stages the steps that the producer is ahead
    """

    block_n: int
    block_k: int
    group_m: int
    num_warps: int
    num_stages: int
    descriptors: bool = True
    specialized: bool = False

    @property
    def sharing(self) -> int:
        """Consumer warpgroups that share a tile: 1 (ping-pong) or 2 (cooperative)."""
        return self.num_warps // GROUP_WARPS

    def without_specialization(self) -> "TileOptions":
        """The same for the portable kernel, with the tile of one warpgroup, whose pipeline need not be as deep."""
        if not self.specialized:
            return self
        width, stages = self.block_n // self.sharing, min(self.num_stages, 3)
        return replace(self, specialized=False, block_n=width, num_warps=GROUP_WARPS, num_stages=stages)


@dataclass(frozen=True, slots=True)
class RowBlocks:
    """How an expert's rows are cut: blocks of `block_m`, the last up to `tail_m` more; see `launch.routing`.

    A block of at most `small_m` rows runs at that height.
    """

    block_m: int
    tail_m: int = 0
    small_m: int = 0


@dataclass(frozen=True, slots=True)
class LaunchOptions:
    """Options of one forward whose pairs are sorted by expert, with products on the matrix units."""

    blocks: RowBlocks
    gate_up: TileOptions
    down: TileOptions


@dataclass(frozen=True, slots=True)
class VectorTile:
    """How one of the products for few rows is cut: output columns a program computes, and Triton's warps for it."""

    block_n: int
    num_warps: int


@dataclass(frozen=True, slots=True)
class GemvOptions:
    """Options of one forward in which every (token, slot) pair reads its weights for itself; see `launch.grouped_gemv`.

    It needs no routing, but two pairs of one expert read its weights twice. For few pairs over many experts.
    """

    gate_up: VectorTile
    down: VectorTile


Options = LaunchOptions | GemvOptions

Shape = tuple[int, int, int, int]
"""experts, top_k, hidden, intermediate"""

Table = dict[Shape, dict[int, Options]]
"""Options by shape and tokens."""


def find_options(device: str, tokens: int, experts: int, top_k: int, hidden: int, intermediate: int) -> Options | None:
    """The entry of this shape for the nearest number of tokens, or None if there is none within reach."""
    entries = load_table(device).get((experts, top_k, hidden, intermediate))
    if not entries or tokens < 1:
        return None
    nearest = min(entries, key=lambda listed: max(listed / tokens, tokens / listed))
    return entries[nearest] if max(nearest / tokens, tokens / nearest) <= _REACH else None


@functools.cache
def load_table(device: str) -> Table:
    """The table of a device, by the name that it gives itself; empty if there is none."""
    path = table_path(device)
    return parse_table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}


def table_path(device: str) -> Path:
    """The path of a device's table: "NVIDIA H200" -> tables/nvidia-h200.json."""
    return FOLDER / (re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json")


def parse_table(document: dict[str, Any]) -> Table:
    """The options of a table's JSON. Raises ValueError for a field that is missing, unknown or impossible."""
    table: Table = {}
    for entry in document["shapes"]:
        shape = (entry["experts"], entry["top_k"], entry["hidden"], entry["intermediate"])
        table[shape] = {int(tokens): _parse_options(fields) for tokens, fields in entry["tokens"].items()}
    return table


def dump_table(device: str, measured: dict[str, Any], table: Table) -> str:
    """The JSON of a table, a line an entry; `measured` says when and with which versions."""
    shapes = []
    for shape, entries in table.items():
        sizes = json.dumps(dict(zip(("experts", "top_k", "hidden", "intermediate"), shape, strict=True)))
        rows = (f'  "{tokens}": {json.dumps(_fields(options))}' for tokens, options in sorted(entries.items()))
        shapes.append(sizes[:-1] + ', "tokens": {\n' + ",\n".join(rows) + "}}")
    head = f'{{"device": {json.dumps(device)},\n"measured": {json.dumps(measured)},\n"shapes": [\n'
    return head + ",\n".join(shapes) + "]}\n"


def _fields(options: Options) -> dict[str, Any]:
    """An entry's JSON; only where warps are specialized does it say so."""
    return asdict(options, dict_factory=lambda pairs: {k: v for k, v in pairs if k != "specialized" or v})


def _parse_options(fields: dict[str, Any]) -> Options:
    expected = ("blocks", "gate_up", "down") if "blocks" in fields else ("gate_up", "down")
    try:
        if set(fields) != set(expected):
            raise ValueError
        if "blocks" not in fields:
            return _check_gemv(GemvOptions(VectorTile(**fields["gate_up"]), VectorTile(**fields["down"])))
        tiles = (TileOptions(**fields["gate_up"]), TileOptions(**fields["down"]))
        return _check_launch(LaunchOptions(RowBlocks(**fields["blocks"]), *tiles))
    except (TypeError, ValueError) as error:
        raise ValueError(f"launch options: expected {error or ', '.join(expected)}, found {fields!r}") from error


def _check_gemv(options: GemvOptions) -> GemvOptions:
    tiles = (options.gate_up, options.down)
    _check_powers_of_2(value for tile in tiles for value in (tile.block_n, tile.num_warps))
    return options


def _check_launch(options: LaunchOptions) -> LaunchOptions:
    blocks, tiles = options.blocks, (options.gate_up, options.down)
    _check_powers_of_2([blocks.block_m, *(v for t in tiles for v in (t.block_n, t.block_k, t.num_warps))])
    _check_powers_of_2(size for size in (blocks.tail_m, blocks.small_m) if size)
    if blocks.tail_m > blocks.block_m or blocks.small_m >= blocks.block_m:
        raise ValueError("tail_m and small_m below block_m")
    if not all(isinstance(v, int) and v > 0 for t in tiles for v in (t.group_m, t.num_stages)):
        raise ValueError("positive group_m and num_stages")
    for tile, columns in zip(tiles, (HALF, 2 * HALF), strict=True):
        shape = (columns * tile.sharing, 128)
        if tile.specialized and (tile.sharing not in (1, 2) or (tile.block_n, tile.block_k) != shape):
            raise ValueError(
                f"num_warps 4 or 8, block_n {columns // GROUP_WARPS} times that, block_k 128 (specialized)"
            )
    return options


def _check_powers_of_2(values: Iterable[Any]) -> None:
    if not all(isinstance(value, int) and value > 0 and value & (value - 1) == 0 for value in values):
        raise ValueError("powers of two")
