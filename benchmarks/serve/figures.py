"""What throughput.py makes of its measurements: medians, ratios, differences of log-probabilities."""

from __future__ import annotations

import statistics
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

from worker import FIGURES, PREFILL, SEQUENCES


def compare(logprobs: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Largest and mean difference of the prompt's log-probabilities, for each pair of backends."""
    names, found = list(logprobs), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            gaps = [abs(a - b) for a, b in zip(logprobs[first], logprobs[second], strict=True)]
            found[f"{first} and {second}"] = {"max": max(gaps), "mean": statistics.mean(gaps)}
    return found


def medians(values: dict[str, list[float]]) -> dict[str, Any]:
    """The median of each figure that was measured, decode also in tokens per second, and the values."""
    found = {figure: statistics.median(each) for figure, each in values.items() if each}
    steps = {figure: value for figure, value in found.items() if figure != PREFILL}
    return {
        "prefill_tokens_per_s": found.get(PREFILL),
        "decode_step_ms": steps,
        "decode_tokens_per_s": {count: 1e3 * int(count) / ms for count, ms in steps.items()},
        "values": values,
    }


def show(rows: dict[str, Any]) -> None:
    """Print a table: tokens per second, and the ratio of quarkconv to the best of the others."""
    print(f"{'tokens/s':14} " + " ".join(f"{column:>12}" for column in [PREFILL, *(f"decode {n}" for n in SEQUENCES)]))
    values: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:14} {row['error']}")
            continue
        prefill = row["prefill_tokens_per_s"]
        values[name] = ({} if prefill is None else {PREFILL: prefill}) | row["decode_tokens_per_s"]
        print(f"{name:14} " + " ".join(f"{values[name].get(figure, float('nan')):12.0f}" for figure in FIGURES))
    ours = values.pop("quarkconv", {})
    best = {figure: max((each[figure] for each in values.values() if figure in each), default=0.0) for figure in ours}
    ratios = [ours[figure] / best[figure] if best.get(figure) else float("nan") for figure in FIGURES]
    print(f"{'over the best':14} " + " ".join(f"{ratio:12.3f}" for ratio in ratios))
