"""What benchmarks/moe_int8.py measured: a file for each GPU, whose cells later runs replace.

The file says which run each row is of: date, commit, command, and what the GPU reads and multiplies in that run.
"""

import json
import statistics
from pathlib import Path
from typing import Any

OTHERS = ("vllm_default_us", "vllm_tuned_us", "humming_us")


def begin(head: dict[str, Any], run: dict[str, Any], kept: Path | None = None) -> dict[str, Any]:
    """A document for the rows of `run`, with those of the file `kept`, which must be of the same GPU."""
    document = head | {"runs": [run], "rows": []}
    if kept is not None and kept.is_file():
        earlier = json.loads(kept.read_text(encoding="utf-8"))
        if earlier["device"] != head["device"]:
            raise SystemExit(f"{kept}: measured on {earlier['device']}, this is {head['device']}")
        document |= {"runs": [*earlier["runs"], run], "rows": earlier["rows"]}
    return document


def record(document: dict[str, Any], row: dict[str, Any]) -> None:
    """Put a row of the last run where the row of its shape and tokens is, or at the end."""
    rows = document["rows"]
    row = row | {"run": len(document["runs"]) - 1}
    same = [at for at, old in enumerate(rows) if (old["shape"], old["tokens"]) == (row["shape"], row["tokens"])]
    if same:
        rows[same[0]] = row
    else:
        rows.append(row)


def dump(document: dict[str, Any]) -> str:
    """The JSON, a line a row, six digits of each number, without the runs of which no row is left."""
    used = sorted({row["run"] for row in document["rows"]})
    rows = []
    for row in document["rows"]:
        rounded = {key: float(f"{value:.6g}") if isinstance(value, float) else value for key, value in row.items()}
        rows.append(json.dumps(rounded | {"run": used.index(row["run"])}))
    head = json.dumps(document | {"runs": [document["runs"][run] for run in used], "rows": []}, indent=1)
    return head.replace('"rows": []', '"rows": [\n' + ",\n".join(rows) + "]") + "\n"


def describe(row: dict[str, Any]) -> str:
    """A row as a line of the terminal."""

    def number(key: str) -> str:
        return f"{row[key]:9.1f}" if key in row else "        -"

    floor = max(row["bytes_floor_us"], row["operations_floor_us"])
    ratios = [f"{row[key] / row['ours_us']:5.2f}" if key in row else "    -" for key in OTHERS]
    times = ("ours_us", *OTHERS, "torch_bf16_us", "bytes_floor_us", "operations_floor_us", "traffic_floor_us")
    numbers = " ".join(map(number, times))
    return f"{row['shape']:15} {row['tokens']:5} {numbers} {' '.join(ratios)} {row['ours_us'] / floor:5.2f}"


def print_means(rows: list[dict[str, Any]]) -> None:
    """Geometric means of each group of cells."""
    for group in ("model", "slice", "other"):
        cells = [row for row in rows if row["group"] == group]
        if not cells:
            continue
        over = [row["ours_us"] / max(row["bytes_floor_us"], row["operations_floor_us"]) for row in cells]
        print(f"{group}: {len(cells)} cells, {statistics.geometric_mean(over):.3f} times the larger floor")
        for key in OTHERS:
            ratios = [row[key] / row["ours_us"] for row in cells if key in row]
            if ratios:
                mean = statistics.geometric_mean(ratios)
                print(f"  {mean:.3f} times as fast as {key[:-3]} over {len(ratios)}, worst {min(ratios):.3f}")
