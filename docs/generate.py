"""Generate the parts of the documents that come from tables in the code, and the table of engines in JSON.

Usage: python docs/generate.py [--check]

The text between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` is replaced; ``--check`` says whether it is current.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
import tomllib
from pathlib import Path
from typing import Any

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


def forward(name: str, *, goal: bool) -> str:
    """Times of the INT8 forward: the shapes and tokens of the goals, or the other ones."""
    found = result(f"moe-int8-{name}")
    rows = [row for row in found["rows"] if row["goal"] == goal]
    columns = [
        ("ours", "ours_us"), ("default", "vllm_default_us"), ("tuned", "vllm_tuned_us"), ("bf16", "torch_bf16_us"),
        ("bytes", "bytes_floor_us"), ("operations", "operations_floor_us"),
    ]  # fmt: skip
    columns = [(title, key) for title, key in columns if all(key in row for row in rows)]
    ratios = [(title, key) for title, key in columns if key.startswith("vllm")]
    titles = ["shape", "tokens", *(title for title, _ in columns), *(f"vs {title}" for title, _ in ratios)]
    lines = [f"| {' | '.join([*titles, 'over floor'])} |", "| --- |" + " ---: |" * len(titles)]
    for row in rows:
        times = [f"{row[key]:.0f}" if row[key] >= 100 else f"{row[key]:.1f}" for _, key in columns]
        times[0] = f"**{times[0]}**"
        over = row["ours_us"] / max(row["bytes_floor_us"], row["operations_floor_us"])
        cells = [
            row["shape"], str(row["tokens"]), *times, *(f"{row[key] / row['ours_us']:.2f}" for _, key in ratios),
            f"{over:.2f}",
        ]  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    ratios_text = []
    for title, key in ratios:
        times_as_fast = [row[key] / row["ours_us"] for row in rows]
        mean = statistics.geometric_mean(times_as_fast)
        ratios_text.append(f"{min(times_as_fast):.2f} to {max(times_as_fast):.2f} times as fast as {title}, "
                    f"geometric mean {mean:.3f}")  # fmt: skip
    return "\n".join(lines) + (f"\n\n{'; '.join(ratios_text)}." if ratios_text else "")


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


def floor_of(row: dict[str, Any], *names: str) -> float:
    """How many times the largest of these floors a forward takes."""
    over: float = row["ours_us"] / max(row[f"{name}_floor_us"] for name in names)
    return over


OTHERS = {"vLLM's default": "vllm_default_us", "vLLM tuned": "vllm_tuned_us", "Humming": "humming_us"}


def best_other(row: dict[str, Any]) -> float | None:
    """How many times as fast as the fastest of the others ours is; None where no other was timed."""
    times = [row[key] for key in OTHERS.values() if key in row]
    return min(times) / row["ours_us"] if times else None


def forward_grid(name: str) -> str:
    """Times over models and slices by tokens, each over the larger floor, and beside the fastest other."""
    rows = [row for row in result(f"moe-int8-{name}")["rows"] if row["group"] != "other"]
    tokens = sorted({row["tokens"] for row in rows})
    lines = [f"| | {' | '.join(map(str, tokens))} |", "| --- |" + " ---: |" * len(tokens)]
    for shape in dict.fromkeys(row["shape"] for row in rows):
        cells = []
        for row in (row for row in rows if row["shape"] == shape):
            time = f"{row['ours_us']:.0f}" if row["ours_us"] >= 100 else f"{row['ours_us']:.1f}"
            ratio = best_other(row)
            beside = "" if ratio is None else f", **{ratio:.2f}**"
            cells.append(f"{time} ({floor_of(row, 'bytes', 'operations'):.2f}{beside})")
        earlier = "".join(sorted({" (earlier)" for row in rows if row["shape"] == shape and row.get("earlier")}))
        lines.append(f"| {shape}{earlier} | {' | '.join(cells)} |")
    now = [row for row in rows if not row.get("earlier")]
    groups = {f"{kind}s": found for kind in ("model", "slice") if (found := [r for r in now if r["group"] == kind])}
    lines += ["", f"| geometric means | {' | '.join(groups)} |", "| --- |" + " ---: |" * len(groups)]
    for label, floors in (("larger floor", ("bytes", "operations")), ("traffic floor", ("operations", "traffic"))):
        means = [statistics.geometric_mean(floor_of(row, *floors) for row in group) for group in groups.values()]
        lines.append(f"| times the {label} | {' | '.join(f'{mean:.3f}' for mean in means)} |")
    for label, key in OTHERS.items():
        cells = []
        for group in groups.values():
            ratios = [row[key] / row["ours_us"] for row in group if key in row]
            cells.append(f"{statistics.geometric_mean(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
        lines.append(f"| times as fast as {label} | {' | '.join(cells)} |")
    cells = []
    for group in groups.values():
        ratios = [ratio for row in group if (ratio := best_other(row)) is not None]
        cells.append(f"{statistics.geometric_mean(ratios):.3f} ({min(ratios):.2f} to {max(ratios):.2f})")
    lines.append(f"| times as fast as the fastest of the three | {' | '.join(cells)} |")
    slower = [f"{row['shape']} at {row['tokens']}" for row in now if (best_other(row) or 1) < 1]
    counts = ", ".join(f"{len(group)} cells of {kind}" for kind, group in groups.items())
    return "\n".join(lines) + f"\n\n{counts}. Slower than the fastest other: {', '.join(slower) or 'no cell'}."


def option_gains() -> str:
    """What other launch options gained, by shape and tokens."""
    rows = result("moe-int8-options-nvidia-h200")["rows"]
    changed = [row for row in rows if row["before"] != row["now"]]
    gains = {id(row): row["before_us"] / row["now_us"] for row in rows}
    lines = ["| shape | E, K, H, I | tokens: us before, now |", "| --- | --- | --- |"]
    for shape in dict.fromkeys(row["shape"] for row in changed):
        cells = [row for row in changed if row["shape"] == shape]
        sizes = ", ".join(str(cells[0][key]) for key in ("experts", "top_k", "hidden", "intermediate"))
        times = (f"{row['tokens']}: {row['before_us']:g}, **{row['now_us']:g}**" for row in cells)
        lines.append(f"| {shape} | {sizes} | {'; '.join(times)} |")
    means = [statistics.geometric_mean(gains[id(row)] for row in found) for found in (changed, rows)]
    return "\n".join(lines) + (
        f"\n\nOther options in {len(changed)} of {len(rows)} cells: {means[0]:.3f} times as fast there, {means[1]:.3f} "
        f"over all (geometric means), {min(gains.values()):.2f} to {max(gains.values()):.2f}."
    )


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
    "forward-h100": lambda: forward("nvidia-h100-80gb-hbm3", goal=True),
    "forward-h100-others": lambda: forward("nvidia-h100-80gb-hbm3", goal=False),
    "forward-h200": lambda: forward("nvidia-h200", goal=True),
    "forward-h200-grid": lambda: forward_grid("grid-nvidia-h200"),
    "forward-h200-models": lambda: forward_grid("models-nvidia-h200"),
    "forward-h200-slices": lambda: forward_grid("slices-nvidia-h200"),
    "forward-h200-options": option_gains,
    "kernel-devices": kernel_devices,
    "served-forms": lambda: served_forms("nvidia-h200"),
    "tuned-tables": tuned.tables,
    "forward-h200-others": lambda: forward("nvidia-h200", goal=False),
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
