"""What ``inspect`` found, as a page: topology, bytes by dtype and kind, findings. No tensor is read for it."""

from __future__ import annotations

from collections.abc import Iterator

from quarkconv.findings import Severity
from quarkconv.inspection.inspection import Inspection
from quarkconv.inspection.sizes import bytes_by_dtype, bytes_by_kind
from quarkconv.report import charts, page


def inspection_report(inspection: Inspection, command: str) -> str:
    """An inspection as one HTML file that needs nothing else.

    Args:
        inspection: what was found.
        command: the command that found it.
    """
    return page.page(f"quarkconv inspect {inspection.model}", inspection.model, _parts(inspection, command))


def _parts(inspection: Inspection, command: str) -> Iterator[str]:
    errors = sum(item.severity is Severity.ERROR for item in inspection.findings)
    said = "Sound: config and tensors agree" if inspection.ok else f"{errors} finding(s) of severity error"
    yield page.verdict(said, good=inspection.ok)
    value = inspection.to_json()
    tool = " ".join(filter(None, (value["quant_method"], value["producer_version"])))
    facts = [
        ("scheme", value["scheme"] or "none"), ("quantized by", tool or "config.json does not say"),
        ("tensors", f"{value['tensors']:,}"), ("bytes", f"{value['bytes']:,}"), ("files", f"{value['shards']:,}"),
    ]  # fmt: skip
    yield page.table_section("What it holds", ("what", "value"), facts)
    yield _findings(inspection)
    yield page.section("Bytes", *_bytes(inspection))
    yield page.section("Mixture of experts", *_topology(inspection))
    targets = [
        (name, "✓ yes" if support.supported else "✗ no", support.nbytes, support.reason)
        for name, support in inspection.targets.items()
    ]
    yield page.table_section("Targets", ("target", "possible", "bytes", "why not"), targets)
    engines = [(fact.engine, fact.version, fact.form, fact.verdict, fact.note) for fact in inspection.engines]
    yield page.table_section("Engines", ("engine", "version", "checkpoint as", "runs as", "note"), engines)
    yield page.about(command)


def _findings(inspection: Inspection) -> str:
    rows = [
        (str(item.severity.value), item.code, item.subject, item.count, item.message, item.hint)
        for item in inspection.findings
    ]
    if not rows:
        return page.section("Findings", page.paragraph("None."))
    head = ("severity", "code", "about", "places", "what was found", "what to do")
    return page.table_section("Findings", head, rows, sortable=True)


def _bytes(inspection: Inspection) -> Iterator[str]:
    description = inspection.description
    for title, sizes in (
        ("Bytes by dtype", bytes_by_dtype(description)),
        ("Bytes by kind", bytes_by_kind(description)),
    ):
        yield charts.bar_chart(
            title, [name for name, _ in sizes], [nbytes for _, nbytes in sizes], x_label="", y_label="B",
            described="; ".join(f"{name}: {nbytes:,} bytes" for name, nbytes in sizes),
        )  # fmt: skip
        yield page.table(("what", "bytes"), sizes, label=title)


def _topology(inspection: Inspection) -> Iterator[str]:
    layers = inspection.description.moe_layers
    if not layers:
        yield page.paragraph("There are no routed experts.")
        return
    rows = [
        (layer.index, layer.prefix, layer.layout, layer.experts, layer.hidden, layer.intermediate,
         "int8" if layer.quantized else "partly" if layer.partly_quantized else "no")
        for layer in layers
    ]  # fmt: skip
    head = ("layer", "experts are in", "layout", "experts", "hidden", "intermediate", "int8")
    yield page.table(head, rows, sortable=True, label="Layers", captioned=True)
