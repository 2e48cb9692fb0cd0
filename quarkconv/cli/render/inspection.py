"""The output of ``inspect`` and ``engines`` in a terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import indented, printable, title, verdict
from quarkconv.cli.render.charts import size_bars
from quarkconv.cli.render.engines import EngineTable
from quarkconv.cli.render.findings import render_findings
from quarkconv.experts.layer import MoELayer
from quarkconv.findings import NOT_UNDERSTOOD
from quarkconv.inspection.engine_facts import NOT_CHECKED, EngineFact
from quarkconv.inspection.engines import stored_form
from quarkconv.inspection.inspection import Inspection, linear_counts, main_scheme
from quarkconv.inspection.sizes import bytes_by_dtype, bytes_by_use
from quarkconv.scheme.formats.undeclared import UndeclaredScheme
from quarkconv.scheme.spec import ModuleScheme, TensorSpec
from quarkconv.text import plural, size


def render_inspection(inspection: Inspection, *, everything: bool) -> RenderableType:
    """Verdict and advice; then findings, contents, targets and engines.

    Args:
        inspection: the answer.
        everything: show all rows of the table of engines, and each finding by itself.
    """
    parts: list[RenderableType] = [_title(inspection), "", *_answer(inspection), ""]
    if inspection.findings:
        parts += [_heading("Findings"), *render_findings(inspection.findings, every=everything), ""]
    parts += [_contents(inspection), ""]
    parts += [_heading("Targets"), *_targets(inspection)]
    if inspection.engines:
        parts += ["", *_engines(inspection, everything)]
    return Group(*parts)


def _heading(text: str) -> Text:
    return Text(text, style="bold")


def _title(inspection: Inspection) -> RenderableType:
    description = inspection.description
    checkpoint, declared = description.checkpoint, description.declared
    if declared is None or isinstance(declared, UndeclaredScheme):
        tool = "no quantization_config"
    else:
        tool = f"{declared.method} {declared.version or ''}".strip()
    facts = [
        description.config.model_type or "unknown model type",
        tool,
        size(checkpoint.tensor_bytes),
        plural(len(checkpoint.types), "tensor"),
        plural(len(checkpoint.shards), "shard"),
    ]
    return title(inspection.model, facts)


def _answer(inspection: Inspection) -> Iterator[RenderableType]:
    """The verdict, the parts not checked, and the advice."""
    yield verdict(printable(inspection.headline), good=inspection.ok)
    if inspection.ok and inspection.not_checked:
        yield indented(f"not checked: {printable('; '.join(inspection.not_checked))}", 2, "dim")
    advice = inspection.advice
    for item in advice:
        yield indented(item.text, 2)
    if advice and (target := advice[0].target):
        command = f"quarkconv convert {printable(shlex.quote(inspection.model))} --to {target}"
        yield Text.assemble(("  convert it: ", "dim"), (command, "cyan"))


def _contents(inspection: Inspection) -> RenderableType:
    """Scheme, experts and other linears, a line for each; sizes as bars."""
    description = inspection.description
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    declared = description.declared.default if description.declared else None
    stored = main_scheme(description)
    if declared is not None and declared != stored:
        table.add_row("  declared", _scheme(declared))
        table.add_row("  stored", _scheme(stored))
    else:
        table.add_row("  scheme", _scheme(stored))
    for label, layer in _alike(description.moe_layers):
        table.add_row("  experts", _experts(label, layer))
    counts = linear_counts(description)
    table.add_row("  other linears", f"{counts['int8']:,} int8, {counts['unquantized']:,} float")
    if not description.checkpoint.types:
        return table
    return Group(table, size_bars((bytes_by_dtype(description), bytes_by_use(description))))


def _scheme(scheme: ModuleScheme) -> Text:
    return Text(f"weights {_spec(scheme.weight)}; activations {_spec(scheme.activation)}")


def _spec(spec: TensorSpec | None) -> str:
    if spec is None:
        return "float"
    words = [spec.dtype, spec.granularity.replace("_", " "), "dynamic" if spec.dynamic else "static"]
    return printable(" ".join(words + ([] if spec.symmetric else ["asymmetric"])))


def _experts(label: str, layer: MoELayer) -> Text:
    """``layers 0-2: 8 experts, H 128, I 96, I8 with F32 scales, per expert (gate_proj)``."""
    dtypes = "/".join(sorted({form.weight.dtype for form in layer.all_forms}))
    scales = "/".join(sorted({form.scale.dtype for form in layer.all_forms if form.scale is not None}))
    return Text.assemble(
        f"{printable(label)}: {layer.experts} experts, ",
        f"H {layer.hidden}, I {layer.intermediate}, ",
        (f"{dtypes} with {scales} scales" if scales else dtypes, "green" if layer.quantized else "red"),
        f", {layer.layout.replace('_', ' ')} ({layer.naming.gate})",
    )


def _alike(layers: tuple[MoELayer, ...]) -> Iterator[tuple[str, MoELayer]]:
    """Runs of layers that look the same, with their numbers as ``layers 1-61``, or ``layers 0-1 of talker.model`` where
    another layer has the same number."""
    unique = len({layer.index for layer in layers}) == len(layers)
    groups: dict[tuple[str, object], list[MoELayer]] = {}
    for layer in layers:
        forms = frozenset(layer.all_forms)
        stack = "" if unique else layer.prefix.partition(".layers.")[0]
        key = (layer.experts, layer.hidden, layer.intermediate, layer.layout, layer.naming, forms)
        groups.setdefault((stack, key), []).append(layer)
    for (stack, _), group in groups.items():
        numbers = number_ranges([layer.index for layer in group])
        label = f"{'layer' if numbers.isdecimal() else 'layers'} {numbers}" + (f" of {stack}" if stack else "")
        yield label, group[0]


def number_ranges(numbers: list[int]) -> str:
    """``0, 2-5`` for 0, 2, 3, 4, 5."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


def _targets(inspection: Inspection) -> Iterator[RenderableType]:
    """Possible targets in one line; then the losses of each, and why the others are impossible."""
    possible = [(name, support) for name, support in inspection.targets.items() if support.supported]
    if possible:
        alike: dict[str, list[str]] = {}
        for name, support in possible:
            alike.setdefault(size(support.nbytes or 0), []).append(name)
        sizes = "; ".join(f"{', '.join(names)}: {nbytes}" for nbytes, names in alike.items())
        yield indented(Text.assemble(("✓ ", "green"), sizes), 2)
    losses: dict[str, list[str]] = {}
    for name, support in possible:
        for loss in support.losses:
            unread = loss.code == NOT_UNDERSTOOD
            lost = "experts as they are, not recognised" if unread else f"without {printable(loss.subject)}"
            losses.setdefault(lost, []).append(name)
    for lost, names_of_targets in losses.items():
        yield indented(f"  {', '.join(names_of_targets)}: {lost}", 2, "dim")
    reasons: dict[str, list[str]] = {}
    for name, support in inspection.targets.items():
        if not support.supported:
            reason = support.reason or ""
            reason = reason.partition(f"{name} cannot represent this checkpoint: ")[2] or reason
            reasons.setdefault(printable(reason), []).append(name)
    for reason, names_of_targets in reasons.items():
        yield indented(Text.assemble(("✗ ", "red"), ", ".join(names_of_targets), (f": {reason}", "dim")), 2)


def _engines(inspection: Inspection, everything: bool) -> Iterator[RenderableType]:
    """The rows that apply: all, or the latest in int8 for each form on NVIDIA GPUs, and one for other devices."""
    shown = list(inspection.engines)
    if not everything:
        latest: dict[object, EngineFact] = {}
        for fact in inspection.engines:
            if fact.verdict == "int8":
                latest.setdefault((fact.engine, "" if fact.devices else fact.form), fact)
        shown = list(latest.values())
    if shown:
        yield EngineTable(shown, stored=stored_form(inspection.description))
    else:
        on_gpus = [fact for fact in inspection.engines if not fact.devices]
        ran = any(fact.model_types and fact.verdict != NOT_CHECKED for fact in on_gpus)
        unknown = not ran and any(fact.verdict == NOT_CHECKED for fact in on_gpus or inspection.engines)
        model_type = printable(inspection.description.config.model_type or "this model type")
        answer = f"not checked with {model_type}" if unknown else "none is known to run it in int8"
        yield Text.assemble(("Engines", "bold"), f"  {answer}")
    if more := len(inspection.engines) - len(shown):
        yield indented(
            f"{plural(more, 'more row')} with --all: other releases and devices, engines that fail", 2, "dim"
        )
