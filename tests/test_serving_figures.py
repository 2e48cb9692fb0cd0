"""The figures of docs/vllm.md are those that benchmarks/serve measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TEXT = (ROOT / "docs" / "vllm.md").read_text("utf-8")
PROSE = " ".join(TEXT.split())
NAMES = {
    "triton": "vLLM Triton (default)",
    "triton-tuned": "vLLM Triton, quarkconv's tables",
    "humming": "vLLM Humming 0.1.19",
    "humming-int8": "vLLM Humming 0.1.19, 8-bit activations",
    "quarkconv": "quarkconv",
}
"""Backends in the results -> their rows in the document."""
Rows = dict[str, list[float]]
"""Backend -> tokens per second in each column."""


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def prefill(run: str) -> dict[str, float]:
    """Of each backend that ran."""
    rows = result(f"serve-{run}-nvidia-h200")["backends"]
    return {key: row["prefill_tokens_per_s"] for key, row in rows.items() if "error" not in row}


def decode(run: str) -> Rows:
    """Of each backend, by the number of sequences."""
    rows = result(f"serve-{run}-nvidia-h200")["backends"]
    return {key: [*row["decode_tokens_per_s"].values()] for key, row in rows.items()}


def spread(run: str) -> float:
    """The largest difference between two rounds of decode of one backend, in percent."""
    rows = result(f"serve-{run}-nvidia-h200")["backends"].values()
    steps: list[list[float]] = [
        times for row in rows for figure, times in row["values"].items() if figure != "prefill" and times
    ]
    return 100 * (max(max(times) / min(times) for times in steps) - 1)


def gains(rows: Rows, others: set[str]) -> list[float]:
    """How many times as fast as the best of the others quarkconv is, in each column."""
    columns = zip(*(row for key, row in rows.items() if key in others), strict=True)
    return [own / max(column) for own, column in zip(rows["quarkconv"], columns, strict=True)]


def cells(values: list[float], form: str = ",.0f") -> str:
    return " | ".join(format(value, form) for value in values)


def require_table(rows: Rows, last: str, ratios: list[float]) -> None:
    """The rows, and the row of ratios below them, follow each other in the document."""
    lines = [f"| {NAMES[key]} | {cells(rows[key])} |" for key in NAMES if key in rows]
    assert "\n".join([*lines, f"| {last} | {cells(ratios, '.2f')} |"]) in TEXT


def test_what_serving_with_the_plugin_gives_was_measured() -> None:
    first, second = prefill("qwen3-30b-a3b-prefill"), decode("qwen3-30b-a3b")
    rows = {key: [first[key], *row] for key, row in second.items()}
    over = {key: first["quarkconv"] / value for key, value in first.items() if key != "quarkconv"}
    best = [min(over.values()), *gains(second, set(second) - {"quarkconv"})]
    assert f"| {NAMES['triton']} | {first['triton']:,.0f} |{'  |' * 4}" in TEXT
    require_table(rows, "over the best other", best)
    assert f"which differ by {spread('qwen3-30b-a3b'):.0f} % at most, in a second run" in PROSE
    runs = ("qwen3-30b-a3b-prefill", "qwen3-30b-a3b", "minimax-m2-prefill", "minimax-m2-decode")
    assert {result(f"serve-{run}-nvidia-h200")["date"] for run in runs} == {"2026-11-29"}
    assert "Triton 3.6, 2026-11-29" in PROSE
    serving = " ".join((ROOT / "docs" / "serving.md").read_text("utf-8").split())
    assert f"Qwen3-30B-A3B prefills {first['triton-tuned'] / first['triton']:.2f} times as fast" in serving
    readme = " ".join((ROOT / "README.md").read_text("utf-8").split())
    tuned = f"{over['triton-tuned']:.2f} times as fast as vLLM 0.33's Triton with tuned tables"
    assert f"{tuned} and {best[0]:.2f} times" in readme
    assert f"decodes {min(best[1:]):.2f} to {max(best[1:]):.2f} times as fast as the best of them" in readme


def test_decode_beside_the_default_table_was_measured() -> None:
    rows = decode("qwen3-30b-a3b-defaults-decode")
    require_table(rows, "over the default", gains(rows, {"triton"}))


def test_what_minimax_serves_with_was_measured() -> None:
    first, second = prefill("minimax-m2-prefill"), decode("minimax-m2-decode")
    others = set(first) - {"quarkconv"}
    assert set(second) == set(first) == {"triton-tuned", "humming", "humming-int8", "quarkconv"}
    rows = {key: [first[key], *row] for key, row in second.items()}
    require_table(rows, "over the best other", gains(rows, others))
    assert f"which differ by {spread('minimax-m2-decode'):.1f} % at most" in PROSE
    assert "error" in result("serve-minimax-m2-prefill-nvidia-h200")["backends"]["triton"]


def test_which_goals_are_met_was_measured() -> None:
    qwen, minimax = prefill("qwen3-30b-a3b-prefill"), prefill("minimax-m2-prefill")
    for words, key in (
        ("meets it over Triton (", "triton-tuned"),
        ("runs it (", "humming"),
        ("misses it over Humming with 8-bit activations (", "humming-int8"),
    ):
        both = [each["quarkconv"] / each[key] for each in (qwen, minimax)]
        assert f"{words}{both[0]:.2f} and {both[1]:.2f})" in PROSE
        assert (min(both) >= 1.15) == (key != "humming-int8")
    for run, missed in (("qwen3-30b-a3b", []), ("minimax-m2-decode", [1])):
        rows = decode(run)
        found = gains(rows, set(rows) - {"quarkconv"})[:2]
        assert [number for number, gain in enumerate(found) if gain < 1.05] == missed
    assert f"but for MiniMax-M2 with 8 sequences ({found[1]:.2f})" in PROSE


def test_what_two_gpus_served_was_measured() -> None:
    document, rows = result("serve-qwen3-30b-a3b-tp2-nvidia-h200"), prefill("qwen3-30b-a3b-tp2")
    ours, other = rows["quarkconv"], rows["triton"]
    assert f"cut to {document['layers']} layers ran at {ours:,.0f} tokens per second" in PROSE
    assert f"default table at {other:,.0f} ({ours / other:.2f}), on {document['date']}" in PROSE
    assert document["commit"].startswith("4006c2b")


def test_how_far_log_probabilities_differ_was_measured() -> None:
    differences = result("serve-qwen3-30b-a3b-prefill-nvidia-h200")["logprob_differences"]
    gaps = {pair: gap["mean"] for pair, gap in differences.items()}
    assert f"between quarkconv and Triton by {gaps['quarkconv and triton']:.3f} in the mean" in PROSE
    assert f"between Humming and Triton by {gaps['triton and humming']:.3f}" in PROSE
    assert f"with 8-bit activations by {gaps['triton and humming-int8']:.3f}" in PROSE
    assert f"with tuned tables by {gaps['triton and triton-tuned']:.3f}" in PROSE


def took(profile: dict[str, Any], kernel: str) -> float:
    """Milliseconds of the kernels whose names hold a word."""
    kernels: dict[str, float] = profile["largest_ms"]
    return sum(ms for name, ms in kernels.items() if kernel in name)


def test_where_the_time_of_a_prefill_goes_was_measured() -> None:
    tuned, cut = (result(f"serve-{run}-nvidia-h200") for run in ("qwen3-30b-a3b-tuned", "minimax-m2-prefill"))
    profiles = {key: row["profile"] for key, row in tuned["backends"].items()}
    assert {f"{profile['busy']:.0%}" for profile in profiles.values()} == {"98%"}
    assert "busy for 98 % of a prefill with each backend" in PROSE
    assert f"gain at most 2 % ({tuned['date']}" in PROSE
    ours = profiles["quarkconv"]
    products = (
        took(ours, "specialized_product"),
        took(profiles["humming-int8"], "void humming<"),
        took(profiles["triton-tuned"], "fused_moe"),
    )
    experts = "products of the experts {:.0f} (Humming {:.0f}, Triton {:.0f})".format(*products)
    assert (
        f"four prompts' {ours['span_ms']:.0f} ms, attention took {took(ours, 'FlashAttn'):.0f} and the {experts}"
        in PROSE
    )
    assert f"the INT8 linears {took(ours, 'cutlass_3x_gemm'):.0f}:" in PROSE
    small = took(ours, "quantize_rows"), took(ours, "combine_kernel")
    assert "took {:.0f}, summing each token's experts {:.0f}".format(*small) in PROSE
    last = cut["backends"]["quarkconv"]["profile"]
    times = [took(last, name) for name in ("FlashAttn", "specialized_product", "gemm_f32f32")]
    assert f"MiniMax-M2's {last['span_ms']:.0f} ms" in PROSE
    assert "attention took {:.0f}, the products {:.0f}, its router, in float32, {:.0f}.".format(*times) in PROSE


def test_what_ranks_served_was_measured() -> None:
    rows = result("evaluate-vllm-ranks")["rows"]
    names = {
        "vLLM Triton": "fused-int8", "quarkconv": "quarkconv-fused-int8", "quarkconv, vLLM 0.30.0": "quarkconv-0.30",
        "vLLM Triton, tensor parallel 2": "tp2-fused-int8", "quarkconv, tensor parallel 2": "quarkconv-tp2-fused-int8",
        "vLLM Triton, expert parallel 2": "ep2-fused-int8", "quarkconv, expert parallel 2": "quarkconv-ep2-fused-int8",
        "vLLM Humming": "humming",
    }  # fmt: skip
    for name, key in names.items():
        distances, perplexity = rows[key]["kl_from_float32"], rows[key]["perplexity_vllm"]
        assert f"| {name} | {distances['vllm']:.4f} | {perplexity:.3f} |" in TEXT
        assert f"that of evaluate in bfloat16 ({distances['evaluate']:.4f})" in PROSE
