"""The report of ``inspect``: verdict, findings, sizes, experts, targets, engines."""

from __future__ import annotations

from collections.abc import Iterator

from quarkconv.inspection.inspection import Inspection
from quarkconv.inspection.sizes import bytes_by_dtype, bytes_by_use
from quarkconv.report import charts, page
from quarkconv.text import size


def inspection_report(inspection: Inspection, command: str) -> str:
    """An inspection as one self-contained HTML file; ``command`` is shown in it."""
    return page.page(f"quarkconv inspect {inspection.model}", inspection.model, _parts(inspection, command))


def _parts(inspection: Inspection, command: str) -> Iterator[str]:
    yield page.verdict(inspection.headline, good=inspection.ok)
    for item in inspection.advice:
        yield page.paragraph(item.text)
    value = inspection.to_json()
    tool = " ".join(filter(None, (value["quant_method"], value["producer_version"])))
    facts = [
        ("scheme", value["scheme"] or "none"),
        ("quantization_config", tool or "none"),
        ("tensors", f"{value['tensors']:,}"),
        ("size", size(value["bytes"])),
        ("shards", f"{value['shards']:,}"),
        ("not checked", "; ".join(inspection.not_checked).encode("ascii", "backslashreplace").decode() or "-"),
    ]
    yield page.table_section("Summary", ("what", "value"), facts)
    yield _findings(inspection)
    yield page.section("Sizes", *_sizes(inspection))
    yield page.section("Mixture of experts", *_topology(inspection))
    targets = [
        (
            name,
            "✓ yes" if support.supported else "✗ no",
            None if support.nbytes is None else page.Bytes(support.nbytes),
            support.reason,
        )
        for name, support in inspection.targets.items()
    ]
    yield page.table_section("Targets", ("target", "possible", "size", "why not"), targets)
    engines = [(fact.engine, fact.version, fact.form, fact.verdict, fact.remark) for fact in inspection.engines]
    yield page.table_section("Engines", ("engine", "version", "checkpoint as", "runs as", "note"), engines)
    yield page.about(command)


def _findings(inspection: Inspection) -> str:
    rows = [
        (str(item.severity.value), item.code, item.subject, item.count, item.message, item.hint)
        for item in inspection.findings
    ]
    if not rows:
        return page.section("Findings", page.paragraph("None."))
    head = ("severity", "code", "subject", "count", "found", "what to do")
    return page.table_section("Findings", head, rows, sortable=True)


def _sizes(inspection: Inspection) -> Iterator[str]:
    description = inspection.description
    for title, sizes in (
        ("Size by dtype", bytes_by_dtype(description)),
        ("Size by use", bytes_by_use(description)),
    ):
        yield charts.bar_chart(
            title,
            [name for name, _ in sizes],
            [nbytes for _, nbytes in sizes],
            x_label="",
            y_label="B",
            described="; ".join(f"{name}: {size(nbytes)}" for name, nbytes in sizes),
        )
        yield page.table(("what", "size"), [(name, page.Bytes(nbytes)) for name, nbytes in sizes], label=title)


def _topology(inspection: Inspection) -> Iterator[str]:
    layers = inspection.description.moe_layers
    if not layers:
        yield page.paragraph("No routed experts were found.")
        return
    rows = [
        (
            layer.index,
            layer.prefix,
            layer.layout.replace("_", " "),
            layer.experts,
            layer.hidden,
            layer.intermediate,
            "int8" if layer.quantized else "partly" if layer.partly_quantized else "no",
        )
        for layer in layers
    ]
    head = ("layer", "module", "layout", "experts", "hidden", "intermediate", "int8")
    yield page.table(head, rows, sortable=True, label="Layers", captioned=True)
