"""How ``inspect`` and ``engines`` look in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Iterator
from typing import Final

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import indented, plural, printable, size, title, verdict
from quarkconv.cli.render.charts import size_bars
from quarkconv.cli.render.findings import render_findings
from quarkconv.experts.topology import MoELayer
from quarkconv.findings import Severity
from quarkconv.inspection.engines import EngineFact, stored_form
from quarkconv.inspection.inspection import Inspection, linear_counts, main_scheme
from quarkconv.inspection.sizes import bytes_by_dtype, bytes_by_kind
from quarkconv.scheme.spec import ModuleScheme, TensorSpec

_VERDICT_STYLES: Final = {"int8": "bold green", "w8a16": "yellow", "wrong": "bold red", "fails": "red"}


def render_inspection(inspection: Inspection) -> RenderableType:
    """Header, scheme, experts, bytes, findings, targets, engines, verdict."""
    description = inspection.description
    parts: list[RenderableType] = [_header(inspection), _scheme(inspection)]
    if description.moe_layers:
        parts.append(_experts(description.moe_layers))
    if description.checkpoint.types:
        bars = size_bars((bytes_by_dtype(description), bytes_by_kind(description)))
        parts += [Text("Bytes", style="bold"), bars, ""]
    if inspection.findings:
        parts += [Text("Findings", style="bold"), *render_findings(inspection.findings), ""]
    parts.append(_targets(inspection))
    if inspection.engines:
        parts.append(engine_table(inspection.engines, evidence=False))
    parts.append(_verdict(inspection))
    return Group(*parts)


def _header(inspection: Inspection) -> RenderableType:
    description = inspection.description
    checkpoint = description.checkpoint
    declared = description.declared
    tool = f"{declared.method} {declared.version or ''}".strip() if declared else "no quantization_config"
    facts = [
        description.config.model_type or "unknown model type", tool, size(checkpoint.tensor_bytes),
        f"{len(checkpoint.types):,} tensors", plural(len(checkpoint.shards), "shard"),
    ]  # fmt: skip
    return title(inspection.model, facts)


def _scheme(inspection: Inspection) -> RenderableType:
    description = inspection.description
    declared = description.declared.default if description.declared else ModuleScheme()
    stored = main_scheme(description)
    counts = linear_counts(description)
    table = Table(title="Scheme", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "weight", "activation"):
        table.add_column(column, style="dim" if not column else None)
    table.add_row("config declares", _spec(declared.weight), _spec(declared.activation))
    table.add_row("tensors hold", _spec(stored.weight), _spec(stored.activation))
    name = inspection.scheme
    closing = Text.assemble(
        ("  scheme ", "dim"), (name or "none", "bold green" if name else "bold red"),
        ("   linears without experts: ", "dim"), f"{counts['int8']} int8, {counts['unquantized']} unquantized",
    )  # fmt: skip
    return Group(table, closing, "")


def _spec(spec: TensorSpec | None) -> Text:
    if spec is None:
        return Text("float")
    words = [spec.dtype, spec.granularity.replace("_", " "), "dynamic" if spec.dynamic else "static"]
    return Text(printable(", ".join(words + ([] if spec.symmetric else ["asymmetric"]))))


def _experts(layers: tuple[MoELayer, ...]) -> RenderableType:
    table = Table(title="Experts", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("layers", "experts", "hidden", "intermediate", "layout", "stored"):
        table.add_column(column)
    for numbers, layer in _alike(layers):
        stored = {form.weight.dtype for form in layer.all_forms}
        style = "green" if layer.quantized else "red"
        scales = "/".join(sorted({form.scale.dtype for form in layer.all_forms if form.scale is not None}))
        table.add_row(
            numbers, str(layer.experts), str(layer.hidden), str(layer.intermediate), layer.layout.replace("_", " "),
            Text(f"{'/'.join(sorted(stored))}" + (f", scale {scales}" if scales else ""), style=style),
        )  # fmt: skip
    names = dict.fromkeys("/".join(layer.naming.projections()) for layer in layers)
    return Group(table, Text(f"  names {' and '.join(names)}", style="dim"), "")


def _alike(layers: tuple[MoELayer, ...]) -> Iterator[tuple[str, MoELayer]]:
    """Runs of layers that look the same, with their numbers as ``1-61``."""
    groups: dict[tuple[object, ...], list[MoELayer]] = {}
    for layer in layers:
        forms = frozenset(layer.all_forms)
        key = (layer.experts, layer.hidden, layer.intermediate, layer.layout, layer.naming, forms)
        groups.setdefault(key, []).append(layer)
    for group in groups.values():
        yield number_ranges([layer.index for layer in group]), group[0]


def number_ranges(numbers: list[int]) -> str:
    """``0, 2-5`` for 0, 2, 3, 4, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _targets(inspection: Inspection) -> RenderableType:
    lines: list[RenderableType] = [Text("Targets", style="bold")]
    for name, support in inspection.targets.items():
        if support.supported:
            lines.append(Text.assemble(("  ✓ ", "green"), name, (f"  {size(support.nbytes or 0)}", "dim")))
            lines += [indented(f"without {printable(loss.subject)}", 6, "dim") for loss in support.losses]
        else:
            lines.append(Text.assemble(("  ✗ ", "red"), name))
            lines.append(indented(printable(support.reason or ""), 6, "dim"))
    return Group(*lines, "")


def engine_table(facts: Iterable[EngineFact], *, evidence: bool) -> Table:
    """Rows of the table of engines, with or without what they hold for and their evidence."""
    table = Table(title="Engines", title_justify="left", title_style="bold", box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("engine", "version", "checkpoint as", "runs as"):
        table.add_column(column, no_wrap=True)
    table.add_column("note", style="dim")
    for fact in facts:
        notes = [fact.note] if fact.note else []
        if evidence:
            notes += [f"only: {', '.join(fact.only_for)}"] if fact.only_for else []
            notes.append(f"evidence: {fact.proof}")
        shown = Text(fact.verdict, style=_VERDICT_STYLES[fact.verdict])
        table.add_row(fact.engine, fact.version, fact.form, shown, "\n".join(notes))
    return table


def _verdict(inspection: Inspection) -> RenderableType:
    errors = [item for item in inspection.findings if item.severity is Severity.ERROR]
    if errors:
        return verdict(f"{plural(len(errors), 'finding')} of severity error", good=False)
    lines: list[RenderableType] = [verdict("Sound: config and tensors agree", good=True)]
    if inspection.advice:
        lines.append(indented(inspection.advice, 2))
    form = stored_form(inspection.description)
    good = next((fact for fact in inspection.engines if fact.verdict == "int8"), None)
    if good is not None and good.form != form:
        command = f"quarkconv convert {printable(shlex.quote(inspection.model))} --to {good.form}"
        lines.append(Text.assemble(("  convert it: ", "dim"), (command, "cyan")))
    return Group(*lines)
