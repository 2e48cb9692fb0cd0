"""The output of ``evaluate`` in a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import console, indented, printable, title, verdict
from quarkconv.cli.render.charts import expert_maps
from quarkconv.evaluate.results import Evaluation, LayerEvaluation
from quarkconv.evaluate.scores import Divergence
from quarkconv.report.series import evaluation_load
from quarkconv.text import plural

_SHOWN_LAYERS: Final = 16
_BAR: Final = 20
_NAMES: Final = {"int8": "INT8", "dequantized": "dequantized", "unquantized": "unquantized"}


def render_evaluation(evaluation: Evaluation) -> RenderableType:
    """Perplexities, divergence, layers, the worst of them, the verdict."""
    facts = [
        evaluation.scheme or "float",
        f"{plural(evaluation.windows, 'window')} of {evaluation.window:,} tokens, {evaluation.scored:,} scored",
        evaluation.device,
    ]
    parts: list[RenderableType] = [title(evaluation.model, facts), _perplexity(evaluation)]
    if evaluation.int8 is not None:
        parts.append(_divergence(evaluation, evaluation.int8))
    if evaluation.layers:
        parts += [_layers(evaluation), *_worst(evaluation)]
    load = evaluation_load(evaluation)
    if load is not None:
        parts += [*expert_maps([load], console().options), ""]
    parts += [indented(Text(remark, style="yellow"), 2) for remark in evaluation.remarks]
    parts.append(verdict(printable(evaluation.verdict), good=evaluation.ok))
    return Group(*parts)


def _perplexity(evaluation: Evaluation) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, value in evaluation.perplexity.items():
        if value is None:
            table.add_row(_NAMES[name], Text("not run", style="dim"), "")
        else:
            table.add_row(_NAMES[name], f"{value.value:.4f}", Text(f"± {value.standard_error:.4f}", style="dim"))
    return _section("Perplexity", table)


def _divergence(evaluation: Evaluation, found: Divergence) -> RenderableType:
    lines = [
        f"KL divergence (nats): mean {found.mean:.3g} ± {found.standard_error:.1g}, median {found.median:.3g}, "
        f"99 % {found.p99:.3g}, max {found.max:.3g}",
        f"top-1 agreement {found.top1:.2%}, RMS of probability differences {found.rms_dp:.2%}",
    ]
    if evaluation.dequantized is not None:
        lines.append(f"dequantized weights, activations not rounded: mean KL {evaluation.dequantized.mean:.3g}")
    return _section(f"INT8 against {evaluation.baseline}", *lines)


def _layers(evaluation: Evaluation) -> RenderableType:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="Layers", title_justify="left", title_style="bold")
    for column in ("layer", "own error", "drift", "experts changed"):
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("", no_wrap=True)
    shown = _largest(evaluation.layers)
    top = max((layer.own for layer in shown), default=0.0)
    for layer in shown:
        changed = "-" if layer.routing_changed is None else f"{layer.routing_changed:.1%}"
        bar = "█" * round(_BAR * layer.own / top) if top else ""
        table.add_row(str(layer.index), f"{layer.own:.4f}", f"{layer.drift:.4f}", changed, Text(bar, style="cyan"))
    lines: list[RenderableType] = [table]
    if len(evaluation.layers) > len(shown):
        lines.append(
            indented(
                f"and {len(evaluation.layers) - len(shown)} more with smaller own errors (all with --json)", 2, "dim"
            )
        )
    note = (
        "own error: relative error of a layer's output on the baseline's hidden states; drift: accumulated error; "
        "experts changed: share of tokens that choose a different set of experts"
    )
    return Group(*lines, indented(note, 2, "dim"), "")


def _largest(layers: tuple[LayerEvaluation, ...]) -> list[LayerEvaluation]:
    worst = sorted(layers, key=lambda layer: -layer.own)[:_SHOWN_LAYERS]
    return sorted(worst, key=lambda layer: layer.index)


def _worst(evaluation: Evaluation) -> Iterator[RenderableType]:
    """The worst experts, and what ablations gave."""
    if evaluation.experts:
        table = Table.grid(padding=(0, 2))
        for _ in range(4):
            table.add_column(justify="right", no_wrap=True)
        table.add_row("layer", "expert", "squared error", "tokens", style="dim")
        for expert in evaluation.experts:
            table.add_row(str(expert.layer), str(expert.expert), f"{expert.error:.2g}", f"{expert.tokens:,}")
        note = "squared error relative to the layer's squared output, on a sample of tokens"
        yield _section("Worst experts", table, Text(note, style="dim"))
    if evaluation.ablations:
        lines = []
        for item in evaluation.ablations:
            change = f"{item.share:.0%} less" if item.share >= 0 else f"{-item.share:.0%} more"
            subject = f"layer {item.index}" if item.expert is None else f"layer {item.index}, expert {item.expert}"
            lines.append(Text(f"without quantizing {subject}: mean KL {item.kl:.3g}, {change}"))
        yield _section("Ablations", *lines)


def _section(name: str, *lines: RenderableType) -> RenderableType:
    return Group(Text(name, style="bold"), *(indented(line, 2) for line in lines), "")
