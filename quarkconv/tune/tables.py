"""The files in which engines look for launch options, and a record of what was measured beside them.

vLLM reads ``E=..,N=..,device_name=...json`` in the folder that VLLM_TUNED_CONFIG_FOLDER names. Below the folder of
SGLANG_MOE_CONFIG_DIR, SGLang reads
``configs/triton_3_6_0/E=..,N=..,device_name=..,dtype=int8_w8a8,per_channel_quant=True.json``.
E and N are the experts and the intermediate size of a rank. A table has a tile for some numbers of tokens; the engine
takes that of the nearest. The names come from the engine itself. vLLM leaves out the dtype of INT8 W8A8, so that its
table also serves BF16 layers of the same size.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.text import alternatives
from quarkconv.tune.grid import Tile, tile_of
from quarkconv.tune.shapes import RankShape

MEASURED: Final = "measured.json"
"""Name of the record in a folder of tables; engines do not read it."""
_TRITON: Final = "triton_version"
"""A key of tables that vLLM's own tuner writes."""
SHIPPED: Final = Path(__file__).with_name("tables")
"""Tables that quarkconv brings: ``vllm``, ``sglang``."""


@dataclass(frozen=True, slots=True)
class Timing:
    """A forward with the fastest tile, and with what the engine chooses without a table.

    Attributes:
        default_us, tuned_us: microseconds, medians.
    """

    tile: Tile
    default_us: float
    tuned_us: float


def dump_table(timings: Mapping[int, Timing]) -> str:
    """An engine's table: number of tokens -> tile."""
    rows = (f'"{tokens}": {json.dumps(timing.tile.to_json())}' for tokens, timing in sorted(timings.items()))
    return "{\n" + ",\n".join(rows) + "\n}\n"


def parse_table(text: str) -> dict[int, Tile]:
    """Tokens -> tile.

    Raises:
        ValueError: it is not such a table.
    """
    entries = json.loads(text)
    if not isinstance(entries, dict):
        raise ValueError(f"launch options: expected an object, found {type(entries).__name__}")
    entries.pop(_TRITON, None)
    return {int(tokens): tile_of(entry) for tokens, entry in entries.items()}


def record(folder: Path, name: str, head: Mapping[str, str], timings: Mapping[RankShape, Mapping[int, Timing]]) -> str:
    """The text of a folder's :data:`MEASURED` with one more table in it; those of other names stay.

    Args:
        folder: the folder of the tables.
        name: the table's file name.
        head: engine, device, date and versions of this measurement.
        timings: by shape and tokens. A table can be for several shapes: its name has neither top_k nor hidden size.

    Raises:
        UsageError: the folder has a file of this name that is not such a record.
    """
    path = folder / MEASURED
    try:
        known: Any = json.loads(path.read_text("utf-8")) if path.is_file() else {}
    except ValueError:
        known = None
    if not isinstance(known, dict):
        raise UsageError(
            "The folder has an unrelated file of that name",
            file=str(path),
            expected="a record of measurements",
            found="something else",
            hint="give another --out",
        )
    known[name] = [{**head, **_sizes(shape), "tokens": _times(each)} for shape, each in sorted(timings.items())]
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(known[key])}" for key in sorted(known)) + "\n}\n"


def _sizes(shape: RankShape) -> dict[str, int]:
    return {"experts": shape.experts, "top_k": shape.top_k, "hidden": shape.hidden, "intermediate": shape.intermediate}


def _times(timings: Mapping[int, Timing]) -> dict[str, dict[str, float]]:
    return {
        str(tokens): {"default_us": round(each.default_us, 1), "tuned_us": round(each.tuned_us, 1)}
        for tokens, each in sorted(timings.items())
    }


def shipped_folder(engine: str) -> Path:
    """The value of the engine's variable for the tables that quarkconv brings.

    Raises:
        UnsupportedError: it brings none for this engine.
    """
    folder = SHIPPED / engine
    if not folder.is_dir():
        brought = sorted(path.name for path in SHIPPED.glob("*") if path.is_dir())
        raise UnsupportedError(
            f"quarkconv has no tables for {engine}",
            expected=alternatives(brought),
            found=engine,
            hint="run `quarkconv tune` on the GPU",
        )
    return folder
