"""The table in docs/serving.md of what the tables that quarkconv brings for vLLM gain."""

from __future__ import annotations

import json
import re
import statistics
from itertools import chain

from quarkconv.tune.tables import MEASURED, SHIPPED

MODELS = {
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "Qwen3-235B-A22B": (128, 8, 4096, 1536),
    "Qwen3-Next-80B-A3B": (512, 10, 2048, 512),
    "MiniMax-M2": (256, 8, 3072, 1536),
    "Step-3.5-Flash": (288, 8, 4096, 1280),
    "Mixtral-8x7B": (8, 2, 4096, 14336),
    "GLM-4.5-Air": (128, 8, 4096, 1408),
    "GLM-4.5": (160, 8, 5120, 1536),
    "DeepSeek-V3": (256, 8, 7168, 2048),
    "Kimi-K2": (384, 8, 7168, 2048),
}
"""Experts, experts per token, hidden and intermediate size."""
TOKENS = ("1", "8", "64", "256", "1024", "4096")


def slices() -> dict[tuple[int, ...], str]:
    """The sizes of a rank -> the model, and its tensor (TP) or expert parallel (EP) size."""
    parts = {sizes: name for name, sizes in MODELS.items()}
    for name, (experts, top_k, hidden, intermediate) in MODELS.items():
        for ranks in (2, 4, 8):
            parts.setdefault((experts, top_k, hidden, intermediate // ranks), f"{name}, TP {ranks}")
            parts.setdefault((experts // ranks, top_k, hidden, intermediate), f"{name}, EP {ranks}")
    return parts


def tables() -> str:
    """What the tables that quarkconv brings for vLLM were measured to gain."""
    entries = json.loads((SHIPPED / "vllm" / MEASURED).read_text())
    names, rows = slices(), []
    for entry in chain.from_iterable(entries.values()):
        sizes = tuple(entry[key] for key in ("experts", "top_k", "hidden", "intermediate"))
        gains = {tokens: each["default_us"] / each["tuned_us"] for tokens, each in entry["tokens"].items()}
        device = re.findall(r"[HBA]\d+", entry["device"])[0]
        cells = [f"{gains[tokens]:.2f}" if tokens in gains else "" for tokens in TOKENS]
        mean = statistics.geometric_mean(gains.values())
        rows.append(f"| {device} | {names[sizes]} | {', '.join(map(str, sizes))} | {mean:.2f} | {' | '.join(cells)} |")
    head = f"| GPU | model, ranks | E, K, H, I | mean | {' | '.join(TOKENS)} |"
    return "\n".join([head, "| --- | --- | --- |" + " ---: |" * (1 + len(TOKENS)), *sorted(rows)])
