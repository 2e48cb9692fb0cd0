"""Generate the parts of the documents that come from tables in the code, and the table of engines in JSON.

Usage: python docs/generate.py [--check]

The text between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is replaced; ``--check`` says whether it is current.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from pathlib import Path
from typing import Any

import forward
import scaling
import tuned

from quarkconv.experts.families import FAMILIES
from quarkconv.findings import CODES
from quarkconv.inspection.engine_facts import ENGINE_NAMES, checked_model_types, engine_facts
from quarkconv.targets import TARGETS
from quarkconv.text import plural

ROOT = Path(__file__).resolve().parents[1]


def findings() -> str:
    """The table of finding codes."""
    rows = ["| code | severity | meaning | conversion |", "| --- | --- | --- | --- |"]
    for name, code in CODES.items():
        refused = "" if code.blocks is None else f"refused, exit {code.blocks.exit_code}"
        rows.append(f"| `{name}` | {code.severity} | {code.meaning} | {refused} |")
    return "\n".join(rows)


def engines() -> str:
    """The table of engines."""
    lines: list[str] = []
    names = dict.fromkeys(fact.engine for fact in engine_facts())
    for engine in names:
        facts = [fact for fact in engine_facts() if fact.engine == engine]
        lines += ["", f"### {ENGINE_NAMES.get(engine, engine)}", ""]
        lines += ["| version | checkpoint as | runs as | only for | note | evidence |", "|" + " --- |" * 6]
        for fact in facts:
            cells = [fact.version, fact.form, f"**{fact.verdict}**", fact.only_for, fact.remark, fact.proof]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines).strip()


def targets() -> str:
    """The table of targets."""
    rows = ["| target | description |", "| --- | --- |"]
    rows += [f"| `{name}` | {target.summary} |" for name, target in TARGETS.items()]
    return "\n".join(rows)


def model_types() -> str:
    """The model types that are known, by the engines whose loaders loaded them."""
    known = {name for family in FAMILIES for name in family.types}
    checked = checked_model_types()
    vllm, sglang = checked["vllm"], checked["sglang"]
    rows = [
        ("vLLM and SGLang", vllm & sglang),
        ("vLLM", vllm - sglang),
        ("SGLang", sglang - vllm),
        ("`not checked`, or an engine fails ([engines.md](engines.md))", known - vllm - sglang),
    ]
    lines = ["| loaded by | `model_type` |", "| --- | --- |"]
    return "\n".join([*lines, *(f"| {who} | {', '.join(sorted(names))} |" for who, names in rows)])


def result(name: str) -> dict[str, Any]:
    """What a benchmark measured."""
    found: dict[str, Any] = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
    return found


def measured(about: dict[str, Any], what: str) -> str:
    """The source of a table: command, machine, versions, date."""
    where = f"{about['machine']}, Python {about['python']}, {about['date']}, commit {about['commit']}"
    return f"{what}: `make bench`, {where}, medians of {about['rounds']} rounds."


def table(first: str, rows: list[tuple[str, list[dict[str, Any]]]], unit: str) -> str:
    """Rows of a benchmark as a table; ``first`` heads the first column, ``unit`` says what ratios are to."""
    lines = [f"| {first} | | wall | processor | peak memory | wall, times {unit} |", "|" + " --- |" * 6]
    for label, items in rows:
        for item in items:
            cells = (
                label, f"`{item['command']}`", f"{item['wall_s']:.2f} s", f"{item['cpu_s']:.2f} s",
                f"{item['peak_bytes'] / 1e6:.0f} MB", f"{item['ratio']:.2f}",
            )  # fmt: skip
            lines.append(f"| {' | '.join(cells)} |")
            label = ""
    return "\n".join(lines)


def copying() -> str:
    """Conversion and copying in turn."""
    found = result("convert")["cp"]
    what = measured(found, f"{found['bytes'] / 1e9:.1f} GB of MiniMax-M2 shapes, 2 layers")
    ratios = next(item["ratios"] for item in found["rows"] if item["command"] == "quarkconv")
    rounds = ", ".join(f"{ratio:.2f}" for ratio in ratios)
    return f"{what}\n\n{table('', [('', found['rows'])], '`cp -r`')}\n\nRound by round: {rounds} times `cp -r`."


def conversion() -> str:
    """Conversion with other options, beside other tools, and with a cold page cache."""
    found = result("convert")
    rows = [
        ("page cache warm", found["main"]["rows"]),
        ("other tools, one round", found["main"]["others"][1:]),
        ("page cache cold", found["cold"]["rows"]),
    ]
    what = measured(found["main"], f"{found['main']['bytes'] / 1e9:.1f} GB of MiniMax-M2 shapes, 2 layers")
    cold = f"With a cold page cache, medians of {found['cold']['rounds']}."
    return f"{what} {cold}\n\n{table('', rows, '`cp -r`')}"


def conversion_growth() -> str:
    """How conversion grows with bytes and with pieces."""
    found = result("convert")
    layers, pieces, small = found["layers"]["sizes"], found["pieces"]["sizes"], found["small"]
    rows = [(f"{plural(item['layers'], 'layer')}, {item['bytes'] / 1e9:.2f} GB", item["rows"]) for item in layers]
    rows.append((f"12 layers of 512 experts, I = 64, {small['bytes'] / 1e9:.2f} GB", small["rows"]))
    rows += [(f"{item['pieces']:,} pieces, {item['bytes'] / 1e6:.0f} MB", item["rows"]) for item in pieces]
    what = measured(found["layers"], "Qwen3-30B-A3B shapes, then many small tensors")
    return f"{what}\n\n{table('', rows, '`cp -r`')}"


def conversion_targets() -> str:
    """The other targets beside fused-int8."""
    found = result("convert")["targets"]
    what = measured(found, f"{found['bytes'] / 1e9:.1f} GB, nearly all of it the experts of a layer of MiniMax-M2")
    return f"{what}\n\n{table('', [('', found['rows'])], '`--to fused-int8`')}"


def checksums() -> str:
    """How fast checksums are."""
    found = result("convert")["checksums"]
    rows = [f"| {item['name']} | {item['gb_per_s']:.2f} GB/s |" for item in found["rows"]]
    about = f"`make bench`, {found['machine']}, Python {found['python']}, {found['date']}:"
    return "\n".join([about, "", "| checksum | one thread |", "| --- | --- |", *rows])


def headers() -> str:
    """Headers of a large checkpoint."""
    found = result("headers")
    what = measured(found, f"Headers of {found['tensors']:,} tensors, 230 GB")
    ratios = " and ".join(f"`{row['command']}` {row['cpu_ratio']:.2f}" for row in found["rows"][1:])
    times = f"Processor time, times that of `json.loads`: {ratios}, medians of the rounds' ratios."
    return f"{what}\n\n{table('', [('', found['rows'])], '`json.loads`')}\n\n{times}"


def kernel_devices() -> str:
    """What is known of the kernels on each GPU."""
    found = result("kernel-devices")
    head = (
        "device", "target", "compiled", "spills", "matrix instruction", "programs an SM", "in flight", "needed", "run",
        "tuned",
    )  # fmt: skip
    lines = [f"| {' | '.join(head)} |", "| --- | --- | ---: | ---: | --- |" + " ---: |" * 3 + " --- | --- |"]
    for row in found["rows"]:
        cells = [
            row["device"], row["target"], str(row["compilations"]), str(row["spills"]),
            f"`{row['matrix']}`" if row["matrix"] else "none: GEMV only",
            str(row["programs"]), f"{row['in_flight'] / 1024:.0f} KB", f"{row['needed'] / 1024:.0f} KB",
            row["ran"] or "not run", row["tuned"] or "heuristic",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    unknown = len(head) - 3
    lines.append(f"| Intel | Xe | not compiled |{' |' * (unknown - 2)} not run | heuristic |")
    return "\n".join(lines)


def served_form(found: dict[str, Any]) -> str:
    """How a form ran: the operands of the kernel, and the largest distance of a layer from exact arithmetic."""
    if "error" in found:
        return f"**fails**: {found['error'].split(':')[0]}"
    operands = {"int8 x int8": "int8", "bfloat16 x int8": "w8a16", "bfloat16 x bfloat16": "bf16"}
    [kernel] = {operands[name] for name in found["kernel"]}
    layers = found["layers"].values()
    exact = {"int8": "to_w8a8", "w8a16": "to_w8a16"}.get(kernel)
    distances = [layer[exact] for layer in layers if exact in layer]
    error = f", {max(distances):.1%}" if distances else ""
    equal = all(all(layer["equal_to_export"].values()) for layer in layers)
    return f"{kernel}{error}" + ("" if equal else ", requantized")


def served_forms(name: str) -> str:
    """What vLLM served of the exports of the tests, form by form."""
    exports = result(f"serve-forms-{name}")["exports"]
    forms = list(next(iter(exports.values()))["forms"])
    rows = [f"| export | {' | '.join(forms)} |", "| --- |" + " --- |" * len(forms)]
    for export, found in exports.items():
        rows.append(f"| {export} | {' | '.join(served_form(found['forms'][form]) for form in forms)} |")
    return "\n".join(rows)


H100, H200 = "moe-int8-nvidia-h100-80gb-hbm3", "moe-int8-nvidia-h200"
PARTS = {
    "scaling": lambda: scaling.measured(result("scale")),
    "transfer-times": lambda: scaling.times(result("scale")),
    "requests": scaling.requests,
    "verify-gpus": lambda: scaling.verification(result("verify-cached-h200")),
    "findings": findings,
    "engines": engines,
    "targets": targets,
    "model-types": model_types,
    "headers": headers,
    "copying": copying,
    "conversion": conversion,
    "conversion-growth": conversion_growth,
    "conversion-targets": conversion_targets,
    "checksums": checksums,
    "forward-h100": lambda: forward.times(result(H100)),
    "forward-h200": lambda: forward.grid(result(H200)),
    "forward-goals": lambda: forward.goals(result(H200), result(H100)),
    "kernel-devices": kernel_devices,
    "served-forms": lambda: served_forms("nvidia-h200"),
    "tuned-tables": tuned.tables,
}
NAMES = (
    "targets",
    "findings",
    "engines",
    "performance",
    "kernel-benchmarks",
    "kernel-devices",
    "serving",
    "scale",
    "verification",
)
DOCUMENTS = [f"docs/{name}.md" for name in NAMES]
ENGINES = "quarkconv/inspection/engines"
"""The table of engines: TOML to edit, JSON to read."""


def engines_json() -> str:
    """The table of engines in JSON, a row a line."""
    table = tomllib.loads((ROOT / f"{ENGINES}.toml").read_text("utf-8"))
    rows = ",\n".join(json.dumps(row, ensure_ascii=False, default=str) for row in table.pop("rows"))
    return f'{json.dumps(table, ensure_ascii=False)[:-1]}, "rows": [\n{rows}\n]}}\n'


def filled(text: str) -> str:
    """A document with its generated parts updated."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        if pattern.search(text):
            generated = make()
            text = pattern.sub(lambda match, generated=generated: f"{match[1]}\n{generated}\n\n{match[2]}", text)
    return text


def main() -> int:
    """Write the documents, or with ``--check`` compare them; the exit code is 1 when they are not current."""
    stale = []
    for name in (f"{ENGINES}.json", *DOCUMENTS):  # the documents show the rows of the JSON
        path = ROOT / name
        before = path.read_text("utf-8")
        after = filled(before) if name in DOCUMENTS else engines_json()
        if after != before:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(after, "utf-8")
    if stale:
        print(("not current, run `make docs`: " if "--check" in sys.argv else "made: ") + ", ".join(stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
