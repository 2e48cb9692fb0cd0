"""The output of ``verify`` in a terminal."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import console, indented, printable, title, verdict
from quarkconv.cli.render.charts import verification_charts
from quarkconv.cli.render.findings import render_findings
from quarkconv.text import examples, plural, size
from quarkconv.verify.layer_results import RESCALED, Distance, LayerNumbers
from quarkconv.verify.results import LinearsResult, NumbersResult, Problem, Verification

_SHOWN_PROBLEMS: Final = 20
_SHOWN_LAYERS: Final = 16
_WORST: Final = 5
_DAMAGED: Final = frozenset({"structure", "bytes"})
"""Stages whose problems a new copy of the checkpoint fixes."""
_FULL_WIDTH: Final = 72
"""Width of a terminal that shows all figures of a layer."""


def render_verification(verification: Verification) -> RenderableType:
    """The three stages, the numbers of each layer, charts, problems, the verdict."""
    parts: list[RenderableType] = [_stages(verification)]
    if verification.findings:
        parts += [*render_findings(verification.findings), ""]
    if verification.numbers.layers:
        parts.append(_numbers(verification.numbers))
    if verification.numbers.not_checked:
        parts.append(_left_out(verification.numbers))
    if verification.numbers.experts:
        parts += [verification_charts(verification.numbers, console().options), _worst(verification)]
    if verification.problems:
        parts.append(_problems(verification.problems))
    parts.append(_verdict(verification))
    return Group(*parts)


def _stages(verification: Verification) -> RenderableType:
    structure, checked, numbers = verification.structure, verification.bytes, verification.numbers
    wrong = {problem.stage for problem in verification.problems}
    manifest = "headers, index and manifest" if structure.manifest else "headers and index"
    compared = "manifest and source" if checked.against_source else "manifest"
    layers = len({layer.module for layer in numbers.layers})
    tokens = " and ".join(f"{count:,}" for count in numbers.tokens)
    amount = f"{plural(layers, 'layer')}, {tokens} token{'' if numbers.tokens == (1,) else 's'} each"
    forward = f"{amount}, on {numbers.device} ({numbers.backend})"
    table = Table.grid(padding=(0, 2))
    for stage, scope, skipped in (
        ("structure", f"{structure.tensors:,} tensors in {plural(structure.files, 'file')}: {manifest}", None),
        ("bytes", f"{checked.pieces:,} pieces, {size(checked.nbytes)}: against {compared}", checked.skipped),
        ("numbers", forward, numbers.skipped),
    ):
        mark = Text("✓", style="bold green")
        if stage in wrong:
            mark = Text("✗", style="bold red")
        elif skipped is not None:
            mark = Text("–", style="bold yellow")
        table.add_row(
            mark, Text(stage, style="bold"), Text(f"not checked: {skipped}" if skipped else scope, style="dim")
        )
    facts = [
        verification.scheme or "no scheme",
        f"source {verification.source}" if verification.source else "no source",
    ]
    return Group(title(verification.model, facts), table, "")


def _numbers(numbers: NumbersResult) -> RenderableType:
    layers = numbers.layers
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, title="INT8 forward", title_justify="left", title_style="bold")
    several = len(numbers.tokens) > 1
    second = "tokens" if several else "experts"
    columns = ("layer", second, "exact", "dequantized", "outliers", "SNR", "cosine", "max")
    shown = len(columns) if console().width >= _FULL_WIDTH else len(columns) - 2
    for column in columns[:shown]:
        table.add_column(column, justify="right", no_wrap=True)
    for layer in _noisiest(layers):
        noise = layer.dequantized
        cells = (
            numbers.label(layer.layer, layer.module),
            str(layer.tokens) if several else f"{layer.reached}/{layer.experts}",
            _error(layer.exact),
            _error(noise),
            "-" if layer.outliers is None else _error(layer.outliers),
            "∞" if noise.snr_db is None else f"{noise.snr_db:.1f} dB",
            f"{noise.cosine:.5f}",
            f"{noise.max_error:.2g}",
        )
        table.add_row(*cells[:shown])
    lines: list[RenderableType] = [table]
    if len(layers) > _SHOWN_LAYERS:
        more = len(layers) - _SHOWN_LAYERS
        lines.append(indented(f"and {more} more with less noise (all with --json)", 2, "dim"))
    for routing, activation in dict.fromkeys((layer.routing, layer.activation) for layer in layers):
        lines.append(indented(printable(f"routing: {routing}; activation: {activation}"), 2, "dim"))
    exact_bound = _range([layer.exact.bound for layer in layers])
    noise_bound = _range([layer.dequantized.bound for layer in layers])
    legend = (
        f"relative errors; exact: against integer arithmetic, bound {exact_bound}; dequantized: against float64 with "
        f"dequantized weights, bound {noise_bound}; max: largest element error / output RMS"
    )
    lines.append(indented(legend, 2, "dim"))
    return Group(*lines, "")


def _left_out(numbers: NumbersResult) -> RenderableType:
    """The layers whose numbers are not checked, by reason."""
    by_reason: dict[str, list[str]] = {}
    for layer in numbers.not_checked:
        by_reason.setdefault(layer.reason, []).append(layer.module)
    lines: list[RenderableType] = [
        indented(printable(f"not checked: {examples(modules)} ({reason})"), 2, "dim")
        for reason, modules in by_reason.items()
    ]
    return Group(*lines, "")


def _range(bounds: list[float]) -> str:
    low, high = f"{min(bounds):.2g}", f"{max(bounds):.2g}"
    return low if low == high else f"{low} to {high}"


def _noisiest(layers: tuple[LayerNumbers, ...]) -> list[LayerNumbers]:
    """Layers out of bounds, then the noisiest others; the charts show all."""

    def rank(at: int) -> tuple[bool, float]:
        noise = layers[at].dequantized.relative_error
        return layers[at].ok, -noise if math.isfinite(noise) else -math.inf

    return [layers[at] for at in sorted(sorted(range(len(layers)), key=rank)[:_SHOWN_LAYERS])]


def _worst(verification: Verification) -> RenderableType:
    """The weights with the largest errors."""
    worst = verification.numbers.worst(_WORST)
    if not worst:
        return Group()
    lines: list[RenderableType] = [Text("Furthest from the unquantized model", style="bold")]
    if (linears := verification.numbers.linears) is not None:
        lines += [indented(printable(line), 2, "dim") for line in _linears(linears)]
    if any(layer.rescaled for layer in verification.numbers.experts):
        lines.append(indented(RESCALED, 2, "dim"))
    for layer, module, role, expert, error in worst:
        weight = f"layer {verification.numbers.label(layer, module)} expert {expert} {role}"
        lines.append(indented(f"{weight}: {error.relative_error:.2%} off, {error.clipped:.2%} clipped", 2, "dim"))
    return Group(*lines, "")


def _linears(linears: LinearsResult) -> Iterator[str]:
    """The int8 linears outside of the routed experts: the worst of them, and those that were not compared."""
    rescaled = f", {linears.rescaled} without factors of their inputs" if linears.rescaled else ""
    for module, error in linears.worst[:1]:
        yield f"{plural(linears.compared, 'other int8 linear')}{rescaled}: at most {error:.2%} off, {module}"
    reasons: dict[str, list[str]] = {}
    for item in linears.not_compared:
        reasons.setdefault(item.reason, []).append(item.module)
    yield from (f"not compared: {examples(modules)} ({reason})" for reason, modules in reasons.items())


def _error(distance: Distance) -> Text:
    text = "equal" if distance.relative_error == 0 else f"{distance.relative_error:.1e}"
    return Text(text, style="green" if distance.ok else "bold red")


def _problems(problems: tuple[Problem, ...]) -> RenderableType:
    lines: list[RenderableType] = [Text("Problems", style="bold")]
    for problem in problems[:_SHOWN_PROBLEMS]:
        where = f"layer {problem.layer}  " if problem.layer is not None else ""
        lines.append(indented(Text.assemble(("✗ ", "bold red"), where, (printable(problem.tensor), "bold")), 2))
        lines.append(indented(printable(problem.message), 6))
    if len(problems) > _SHOWN_PROBLEMS:
        lines.append(indented(f"and {len(problems) - _SHOWN_PROBLEMS} more (all with --json)", 2, "dim"))
    if _DAMAGED & {problem.stage for problem in problems}:
        lines.append(indented("→ copy, download or convert the checkpoint again", 2, "green"))
    return Group(*lines, "")


def _verdict(verification: Verification) -> Text:
    return verdict(verification.verdict(), good=verification.ok)
