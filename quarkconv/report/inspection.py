"""What ``inspect`` found, as a page: topology, bytes by dtype and kind, findings. No tensor is read for it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from math import prod

from quarkconv.findings import Severity
from quarkconv.headers.safetensors import DTYPE_BITS
from quarkconv.inspection.inspection import Inspection
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
    facts = [
        ("scheme", value["scheme"] or "none"), ("quantized by", f"{value['quant_method']} {value['producer_version']}"),
        ("tensors", f"{value['tensors']:,}"), ("bytes", f"{value['bytes']:,}"), ("files", f"{value['shards']:,}"),
    ]  # fmt: skip
    yield page.section("What it holds", page.table(("what", "value"), facts))
    yield page.section("Findings", _findings(inspection))
    yield page.section("Bytes", *_bytes(inspection))
    yield page.section("Mixture of experts", *_topology(inspection))
    targets = [
        (name, "✓ yes" if support.supported else "✗ no", support.nbytes, support.reason or "")
        for name, support in inspection.targets.items()
    ]
    yield page.section("Targets", page.table(("target", "possible", "bytes", "why not"), targets))
    engines = [(fact.engine, fact.version, fact.form, fact.verdict, fact.note) for fact in inspection.engines]
    yield page.section("Engines", page.table(("engine", "version", "checkpoint as", "runs as", "note"), engines))
    yield page.about(command)


def _findings(inspection: Inspection) -> str:
    rows = [
        (str(item.severity.value), item.code, item.subject, item.count, item.message, item.hint)
        for item in inspection.findings
    ]
    if not rows:
        return page.paragraph("None.")
    return page.table(("severity", "code", "about", "places", "what was found", "what to do"), rows, sortable=True)


def _bytes(inspection: Inspection) -> Iterator[str]:
    by_dtype: Counter[str] = Counter()
    by_kind: Counter[str] = Counter()
    members = inspection.description.topology.members
    for name, (dtype, shape) in inspection.description.checkpoint.kinds.items():
        nbytes = DTYPE_BITS[dtype] * prod(shape) // 8
        by_dtype[dtype] += nbytes
        module = name.removesuffix(".weight")
        if name.endswith(("_scale", "_zero_point")):
            by_kind["scales and zero points"] += nbytes
        elif module in members or name in members:
            by_kind["routed experts"] += nbytes
        else:
            by_kind["int8 linears" if dtype == "I8" else "everything else"] += nbytes
    for title, counts in (("Bytes by dtype", by_dtype), ("Bytes by kind", by_kind)):
        ordered = counts.most_common()
        yield charts.bar_chart(
            title, [name for name, _ in ordered], [nbytes / 1e9 for _, nbytes in ordered], x_label="", y_label="GB",
            described="; ".join(f"{name}: {nbytes / 1e9:.3g} GB" for name, nbytes in ordered),
        )  # fmt: skip
        yield page.table(("what", "bytes"), ordered, caption=title)


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
    yield page.table(head, rows, sortable=True, caption="Layers")
