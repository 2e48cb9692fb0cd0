"""The tables of docs/kernel-benchmarks.md: times of the INT8 forward, and where its goals stand."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NamedTuple

Row = dict[str, Any]

OTHERS = {"vLLM's default": "vllm_default_us", "vLLM tuned": "vllm_tuned_us", "Humming": "humming_us"}
GROUPS = {"models": "model", "slices": "slice"}
MICROSECONDS = {
    "ours": "ours_us", "default": "vllm_default_us", "tuned": "vllm_tuned_us", "bf16": "torch_bf16_us",
    "bytes": "bytes_floor_us", "operations": "operations_floor_us",
}  # fmt: skip
LARGER, TRAFFIC = ("bytes", "operations"), ("operations", "traffic")


def over_floor(row: Row, floors: tuple[str, ...] = LARGER) -> float:
    """How many times the largest of these floors a forward takes."""
    over: float = row["ours_us"] / max(row[f"{name}_floor_us"] for name in floors)
    return over


def over_other(row: Row, key: str) -> float | None:
    """How many times as fast as one of the others ours is; None where it was not timed."""
    return row[key] / row["ours_us"] if key in row else None


def over_fastest(row: Row) -> float | None:
    """The same for the fastest of the others."""
    return min((over for key in OTHERS.values() if (over := over_other(row, key)) is not None), default=None)


def microseconds(time: float) -> str:
    """Three digits."""
    return f"{time:.0f}" if time >= 100 else f"{time:.1f}"


def mean_and_range(values: Iterable[float | None]) -> str:
    """``1.21 (1.01 to 1.73)``."""
    found = [value for value in values if value is not None]
    return f"{statistics.geometric_mean(found):.2f} ({min(found):.2f} to {max(found):.2f})" if found else ""


def grid(found: dict[str, Any]) -> str:
    """Times by shape and tokens, geometric means, and the run of each cell."""
    rows = [row for row in found["rows"] if row["group"] in GROUPS.values()]
    tokens = sorted({row["tokens"] for row in rows})
    lines = [f"| | {' | '.join(map(str, tokens))} |", "| --- |" + " ---: |" * len(tokens)]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        cells = {row["tokens"]: grid_cell(row) for row in rows if row["shape"] == shape}
        lines.append(f"| {shape} | {' | '.join(cells.get(count, '') for count in tokens)} |")
    groups = [[row for row in rows if row["group"] == group] for group in GROUPS.values()]
    lines += ["", f"| geometric mean | {' | '.join(GROUPS)} |", "| --- |" + " ---: |" * len(groups)]
    measures: dict[str, Callable[[Row], float | None]] = {
        "times the larger floor": over_floor,
        "times the traffic floor": partial(over_floor, floors=TRAFFIC),
        **{f"times as fast as {name}": partial(over_other, key=key) for name, key in OTHERS.items()},
        "times as fast as the fastest of these": over_fastest,
    }
    for label, measure in measures.items():
        lines.append(f"| {label} | {' | '.join(mean_and_range(map(measure, group)) for group in groups)} |")
    return "\n".join([*lines, "", *runs(found["runs"], rows)])


def grid_cell(row: Row) -> str:
    """Microseconds, times the larger floor, times as fast as the fastest other."""
    fastest = over_fastest(row)
    beside = "" if fastest is None else f", **{fastest:.2f}**"
    return f"{microseconds(row['ours_us'])} ({over_floor(row):.2f}{beside})"


def runs(found: list[dict[str, Any]], rows: list[Row]) -> list[str]:
    """Which run timed which cells, newest last."""
    lines = []
    for number, run in enumerate(found):
        timed = [row for row in rows if row["run"] == number]
        names = []
        for shape in dict.fromkeys(row["shape"] for row in timed):
            mine = [str(row["tokens"]) for row in timed if row["shape"] == shape]
            whole = len(mine) == sum(row["shape"] == shape for row in rows)
            names.append(shape if whole else f"{shape} at {', '.join(mine)}")
        rates = run["ceilings"]
        read, products = rates["read_bytes_per_s"] / 1e12, rates["int8_ops_per_s"] / 1e12
        where = f"{run['date']}, commit {run['commit']}, reads {read:.2f} TB/s, dense int8 {products:.0f} TOP/s"
        lines.append(f"- {where}: {'; '.join(names)}.")
    return lines


def times(found: dict[str, Any]) -> str:
    """All times of a run beside vLLM's, a row a size."""
    ratios = {f"vs {name}": key for name, key in MICROSECONDS.items() if key.startswith("vllm")}
    lines = [f"| shape | tokens | {' | '.join([*MICROSECONDS, *ratios, 'over floor'])} |"]
    lines.append("| --- |" + " ---: |" * (len(MICROSECONDS) + len(ratios) + 2))
    for row in found["rows"]:
        cells = [microseconds(row[key]) if key in row else "" for key in MICROSECONDS.values()]
        cells[0] = f"**{cells[0]}**"
        cells += [f"{row[key] / row['ours_us']:.2f}" for key in ratios.values()]
        lines.append(f"| {row['shape']} | {row['tokens']} | {' | '.join(cells)} | {over_floor(row):.2f} |")
    over = (f"{mean_and_range(over_other(row, key) for row in found['rows'])} over {name[3:]}"
            for name, key in ratios.items())  # fmt: skip
    return "\n".join([*lines, "", f"Geometric means: {'; '.join(over)}."])


class Goal(NamedTuple):
    """A bound on the worst of some cells, or on their geometric mean."""

    text: str
    of: Callable[[Row], bool]
    measure: Callable[[Row], float | None]
    bound: float
    mean: bool = False
    most: bool = False

    def verdict(self, rows: list[Row]) -> str:
        """``met: 1.01 to 1.73``; empty where none of the cells was timed."""
        found = [value for row in rows if self.of(row) and (value := self.measure(row)) is not None]
        if not found:
            return ""
        figure = statistics.geometric_mean(found) if self.mean else max(found) if self.most else min(found)
        met = figure <= self.bound if self.most else figure >= self.bound
        text = f"{figure:.2f}" if self.mean else f"{min(found):.2f} to {max(found):.2f}"
        return f"{'met' if met else 'not met'}: {text}"


def of(group: str | None = None, *, tokens: int | None = None, shapes: Iterable[str] = ()) -> Callable[[Row], bool]:
    """Cells of a group, or of both, with so many tokens, or with any, of these shapes, or of all."""
    groups = GROUPS.values() if group is None else (GROUPS[group],)
    return lambda row: (
        row["group"] in groups and tokens in (None, row["tokens"]) and (not shapes or row["shape"] in shapes)
    )


LARGE, SMALL = ("MiniMax-M2", "Step-3.5-Flash"), ("Qwen3-30B-A3B", "Mixtral-8x7B")
OVER_WEIGHTS = partial(over_floor, floors=("bytes",))
DEFAULT, TUNED = (partial(over_other, key=OTHERS[name]) for name in ("vLLM's default", "vLLM tuned"))
GOALS = (
    Goal("no size slower than the fastest other", of(), over_fastest, 1),
    Goal("1.3 times as fast as the fastest other", of(), over_fastest, 1.3, mean=True),
    Goal("slices: 1.4 times as fast as the fastest other", of("slices"), over_fastest, 1.4, mean=True),
    Goal("models: at most 1.2 times the larger floor", of("models"), over_floor, 1.2, mean=True, most=True),
    Goal("slices: at most 1.6 times the larger floor", of("slices"), over_floor, 1.6, mean=True, most=True),
    Goal("models: 1.3 times as fast as vLLM tuned", of("models"), TUNED, 1.3, mean=True),
    Goal("models: 1.8 times as fast as vLLM's default", of("models"), DEFAULT, 1.8, mean=True),
    Goal("each model at 1 token: 1.3 over tuned", of("models", tokens=1), TUNED, 1.3),
    Goal("each model at 4096 tokens: 1.5 over tuned", of("models", tokens=4096), TUNED, 1.5),
    Goal("MiniMax-M2 and Step-3.5-Flash at 64 tokens: 1.1 times reading the weights",
         of(tokens=64, shapes=LARGE), OVER_WEIGHTS, 1.1, most=True),
    Goal("Qwen3-30B-A3B and Mixtral-8x7B at 64 tokens: 1.25 times reading the weights",
         of(tokens=64, shapes=SMALL), OVER_WEIGHTS, 1.25, most=True),
)  # fmt: skip


def goals(*found: dict[str, Any]) -> str:
    """What was aimed at, and where it stands on each GPU."""
    devices = [f"{each['device'].removeprefix('NVIDIA ').split()[0]}, vLLM {each['vllm']}" for each in found]
    lines = [f"| goal (geometric mean, or each size) | {' | '.join(devices)} |", "| --- |" + " --- |" * len(found)]
    lines += [f"| {goal.text} | {' | '.join(goal.verdict(each['rows']) for each in found)} |" for goal in GOALS]
    return "\n".join(lines)
