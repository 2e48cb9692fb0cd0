"""The report of ``evaluate``: verdict, perplexity, divergence, layers, experts and their load, ablations."""

from __future__ import annotations

from collections.abc import Iterator

from quarkconv.evaluate.results import Evaluation
from quarkconv.report import charts, page
from quarkconv.report.series import evaluation_load
from quarkconv.text import plural


def evaluation_report(evaluation: Evaluation, command: str) -> str:
    """An evaluation as one self-contained HTML file; ``command`` is shown in it."""
    return page.page(f"quarkconv evaluate {evaluation.model}", evaluation.model, _parts(evaluation, command))


def _parts(evaluation: Evaluation, command: str) -> Iterator[str]:
    yield page.verdict(evaluation.verdict, good=evaluation.ok)
    for text in evaluation.remarks:
        yield page.paragraph(text)
    yield page.table_section("What was evaluated", ("what", "value"), _facts(evaluation))
    yield page.section("Perplexity", *_perplexity(evaluation))
    if evaluation.int8 is not None:
        yield page.table_section(f"Divergence from the {evaluation.baseline} model", *_divergence(evaluation))
    if evaluation.layers:
        yield page.section("Layers", *_layers(evaluation))
    loaded = [layer for layer in evaluation.layers if layer.load]
    if loaded or evaluation.experts:
        yield page.section("Experts", *_experts(evaluation))
    if evaluation.ablations:
        rows = [(item.index, item.expert, item.module, item.kl, 100 * item.share) for item in evaluation.ablations]
        head = ("layer", "expert", "module", "mean KL divergence (nats)", "less than the INT8 model's (%)")
        yield page.table_section("Without quantizing one layer or expert", head, rows, sortable=True)
    yield page.about(command)


def _facts(evaluation: Evaluation) -> list[tuple[str, str]]:
    return [
        ("unquantized", evaluation.unquantized or "not given"),
        ("scheme", evaluation.scheme or "float"),
        ("tokens from", evaluation.tokens_from),
        ("windows", f"{evaluation.windows:,} of {evaluation.window:,} tokens, {evaluation.scored:,} scored"),
        ("device", evaluation.device),
    ]


def _perplexity(evaluation: Evaluation) -> Iterator[str]:
    rows = [
        (name, None if value is None else value.value, None if value is None else value.standard_error)
        for name, value in evaluation.perplexity.items()
    ]
    yield page.table(("model", "perplexity", "standard error"), rows, label="Perplexity")
    known = {name: value.value for name, value in evaluation.perplexity.items() if value is not None}
    if len(known) > 1:
        yield charts.bar_chart(
            "Perplexity", list(known), list(known.values()), x_label="model", y_label="perplexity",
            described="; ".join(f"{name} {value:.4f}" for name, value in known.items()) + ".",
        )  # fmt: skip


def _divergence(evaluation: Evaluation) -> tuple[tuple[str, ...], list[tuple[str | float, ...]]]:
    head = (
        "model", "mean KL (nats)", "standard error", "median", "99 %", "max", "top-1 agreement (%)",
        "RMS of probability differences (%)",
    )  # fmt: skip
    rows: list[tuple[str | float, ...]] = [
        (name, item.mean, item.standard_error, item.median, item.p99, item.max, 100 * item.top1, 100 * item.rms_dp)
        for name, item in (("int8", evaluation.int8), ("dequantized", evaluation.dequantized))
        if item is not None
    ]
    return head, rows


def _layers(evaluation: Evaluation) -> Iterator[str]:
    layers = evaluation.layers
    numbers = [layer.index for layer in layers]
    worst = evaluation.worst_layers[0]
    yield charts.line_chart(
        f"Error of each layer; the largest of its own: {worst.own:.3g} in layer {worst.index}", numbers,
        {"own": [layer.own for layer in layers], "drift": [layer.drift for layer in layers]},
        y_label="relative error", log=True,
        described=f"Relative error by layer. Own errors: {min(layer.own for layer in layers):.3g} to {worst.own:.3g}, "
        f"the largest in layer {worst.index}. Drift after the last layer: {layers[-1].drift:.3g}.",
    )  # fmt: skip
    changed = [layer for layer in layers if layer.routing_changed is not None]
    if changed:
        most = max(changed, key=lambda layer: layer.routing_changed or 0.0)
        yield charts.line_chart(
            "Tokens that choose another set of experts", [layer.index for layer in changed],
            {"share of tokens": [layer.routing_changed for layer in changed]}, y_label="share",
            described=f"Share of tokens by layer, at most {most.routing_changed:.2%} in layer {most.index}.",
        )  # fmt: skip
    head = ("layer", "module", "own error", "drift", "cosine", "experts changed (% of tokens)")
    rows = [
        (item.index, item.module, item.own, item.drift, item.cosine,
         None if item.routing_changed is None else 100 * item.routing_changed)
        for item in layers
    ]  # fmt: skip
    yield page.table(head, rows, sortable=True, label="Layers", captioned=True)
    yield page.paragraph(
        "Own error: relative error of a layer's output on the baseline's hidden states. Drift: accumulated error; "
        "cosine: cosine similarity of the same hidden states. "
        "Experts changed: share of tokens that choose a different set of experts."
    )


def _experts(evaluation: Evaluation) -> Iterator[str]:
    load = evaluation_load(evaluation)
    if load is not None:
        yield charts.heat_map(load)
    rows = [(item.layer, item.expert, item.error, item.tokens) for item in evaluation.experts]
    if rows:
        head = ("layer", "expert", "squared error / the layer's squared output", "tokens of the sample")
        yield page.table(head, rows, label="Worst experts", captioned=True, sortable=True)
    if evaluation.float_experts:
        text = f"{plural(len(evaluation.float_experts), 'module')} of experts stored in float, evaluated in float: "
        yield page.paragraph(text + ", ".join(evaluation.float_experts))
    if evaluation.float_linears:
        text = f"{plural(len(evaluation.float_linears), 'int8 linear')} evaluated in float: "
        yield page.paragraph(text + ", ".join(evaluation.float_linears))
