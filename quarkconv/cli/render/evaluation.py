"""The output of ``evaluate`` in a terminal."""

from __future__ import annotations

from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import indented, printable, title, verdict
from quarkconv.evaluate.results import Evaluation, LayerEvaluation
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
        parts.append(_divergence(evaluation))
    if evaluation.layers:
        parts += [_layers(evaluation), _worst(evaluation)]
    if evaluation.float_experts:
        text = f"{plural(len(evaluation.float_experts), 'MoE layer')} stored in float, evaluated in float"
        parts.append(indented(Text(text, style="yellow"), 2))
    parts.append(_verdict(evaluation))
    return Group(*parts)


def _perplexity(evaluation: Evaluation) -> RenderableType:
    table = Table.grid(padding=(0, 2))
    for name, value in evaluation.perplexity.items():
        if value is None:
            table.add_row(_NAMES[name], Text("not run", style="dim"), "")
        else:
            table.add_row(_NAMES[name], f"{value.value:.4f}", Text(f"± {value.standard_error:.4f}", style="dim"))
    return Group(Text("Perplexity", style="bold"), indented(table, 2), "")  # type: ignore[arg-type]


def _divergence(evaluation: Evaluation) -> RenderableType:
    found = evaluation.int8
    assert found is not None
    lines = [
        f"KL divergence  mean {found.mean:.3g} ± {found.standard_error:.1g}, median {found.median:.3g}, "
        f"99 % {found.p99:.3g}, max {found.max:.3g}",
        f"same top token {found.top1:.2%}, RMS of probability differences {found.rms_dp:.2%}",
    ]
    if evaluation.dequantized is not None:
        lines.append(f"rounding the weights alone: KL {evaluation.dequantized.mean:.3g}")
    heading = Text(f"INT8 against {evaluation.baseline}", style="bold")
    return Group(heading, *(indented(line, 2) for line in lines), "")


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
        lines.append(indented(f"and {len(evaluation.layers) - len(shown)} more with less (all with --json)", 2, "dim"))
    note = (
        "own error: relative error of a layer's output on the baseline's hidden states; drift: accumulated error; "
        "experts changed: share of tokens that choose other experts"
    )
    return Group(*lines, indented(note, 2, "dim"), "")


def _largest(layers: tuple[LayerEvaluation, ...]) -> list[LayerEvaluation]:
    worst = sorted(layers, key=lambda layer: -layer.own)[:_SHOWN_LAYERS]
    return sorted(worst, key=lambda layer: layer.index)


def _worst(evaluation: Evaluation) -> RenderableType:
    lines: list[RenderableType] = []
    for item in evaluation.ablations:
        text = f"without quantizing layer {item.index}: KL {item.kl:.3g}, {item.share:.0%} less"
        lines.append(indented(text, 2))
    for expert in evaluation.experts:
        text = (
            f"layer {expert.layer} expert {expert.expert}: squared error {expert.error:.2g} of its layer's output, "
            f"{plural(expert.tokens, 'token')} of the sample"
        )
        lines.append(indented(text, 2, "dim"))
    return Group(Text("Where it is lost", style="bold"), *lines, "") if lines else Group()


def _verdict(evaluation: Evaluation) -> Text:
    if evaluation.exceeded:
        return verdict(printable("; ".join(evaluation.exceeded)), good=False)
    if evaluation.int8 is None:
        return verdict("Evaluated in float: the checkpoint holds no INT8 modules", good=True)
    limits = evaluation.limits
    kept = limits.max_kl is not None or limits.min_agreement is not None
    return verdict("Within the limits" if kept else "Evaluated", good=True)
