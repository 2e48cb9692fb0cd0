"""Write the tables of quarkconv/tune/tables/vllm from what benchmarks/moe_int8.py measured of vLLM's kernel.

    PYTHONPATH=.venv-engines/vllm python benchmarks/vllm_tables.py

Writes a table for each shape that was measured at five numbers of tokens or more, from the latest result that has it.
Where vLLM's own choice was the fastest, the table holds what vLLM chooses, which is the same in 0.33 as in 0.25.1.
Tables that `quarkconv tune` wrote stay.
"""

from __future__ import annotations

import json
import os
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

os.environ.update(CUDA_VISIBLE_DEVICES="", VLLM_TARGET_DEVICE="cpu", VLLM_LOGGING_LEVEL="ERROR")

from vllm.model_executor.layers.fused_moe import fused_moe

from quarkconv.tune.grid import Tile
from quarkconv.tune.kernels import VLLMKernel
from quarkconv.tune.shapes import RankShape, whole
from quarkconv.tune.tables import MEASURED, SHIPPED, Timing, dump_table, record

BY = "benchmarks/moe_int8.py"
RESULTS = (Path(__file__).parent / "results").glob("moe-int8-*nvidia-*.json")
FEWEST = 5
_TILE = re.compile(r"(\d+)x(\d+)x(\d+) group (\d+) warps (\d+) stages (\d+)")


def tile(text: str, kernel: VLLMKernel, shape: RankShape, tokens: int) -> Tile:
    """``16x64x128 group 1 warps 4 stages 3``, or ``default``."""
    match = _TILE.fullmatch(text)
    return Tile(*map(int, match.groups())) if match else kernel.default(shape, tokens)


def write_tables(result: dict[str, Any], folder: Path) -> None:
    """The tables of one GPU."""
    name = result["device"].replace(" ", "_")
    fused_moe.get_device_name_as_file_name = lambda: name
    fused_moe.get_moe_configs.cache_clear()
    kernel, tables = VLLMKernel(), defaultdict[RankShape, dict[int, Timing]](dict)
    for row in (row for row in result["rows"] if "vllm_tuned" in row):
        shape, tokens = whole(*(row[key] for key in ("experts", "top_k", "hidden", "intermediate"))), row["tokens"]
        chosen = tile(row["vllm_tuned"], kernel, shape, tokens)
        tables[shape][tokens] = Timing(chosen, row["vllm_default_us"], row["vllm_tuned_us"])
    head = (
        {"by": BY}
        | {key: result[key] for key in ("device", "date", "torch", "triton")}
        | {"engine": f"vllm {result['vllm']}"}
    )
    known = json.loads((folder / MEASURED).read_text()) if (folder / MEASURED).is_file() else {}
    for shape, timings in tables.items():
        path = kernel.table_path(folder, shape)
        if len(timings) >= FEWEST and all(entry["by"] == BY for entry in known.get(path.name, [])):
            path.write_text(dump_table(timings))
            (folder / MEASURED).write_text(record(folder, path.name, head, {shape: timings}))


if __name__ == "__main__":
    SHIPPED.joinpath("vllm").mkdir(parents=True, exist_ok=True)
    results = [each for each in (json.loads(path.read_text()) for path in RESULTS) if each.get("vllm")]
    for result in sorted(results, key=lambda result: str(result["date"])):
        write_tables(result, SHIPPED / "vllm")
