"""Documents: links lead somewhere, commands exist, and figures are those that were measured."""

from __future__ import annotations

import json
import re
import statistics
import tomllib
from pathlib import Path
from typing import Any

import pytest
from support.commands import Result
from support.program import run_cli

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
README = (ROOT / "README.md").read_text("utf-8")


def named(path: Path) -> str:
    return str(path.relative_to(ROOT))


def anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    prose = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.*)$", prose, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)]+)\)", path.read_text("utf-8")):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        found = (path.parent / name).resolve() if name else path
        assert found.exists(), target
        assert not anchor or anchor in anchors(found), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=named)
def test_every_command_exists(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = path.read_text("utf-8")
    commands = re.findall(r"(?:^ {4}|`)quarkconv (?!without checksums)([a-z]+)\b([^\n`|>]*)", text, re.MULTILINE)
    helps = {name: run_cli(capsys, name, "--help") for name in {name for name, _ in commands}}
    for name, rest in commands:
        code, out, _ = helps[name]
        assert code == 0, name
        for option in re.findall(r"--[a-z-]+", rest):
            assert option in out, f"quarkconv {name} {option}"


def test_the_readme_is_read_in_a_minute() -> None:
    lines = README.splitlines()
    assert len(lines) <= 110
    assert (
        lines[2]
        == "quarkconv makes INT8 MoE checkpoints from AMD Quark load correctly in vLLM and SGLang, and proves it."
    )


def test_the_fields_of_json_are_those_that_commands_print(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    text = (ROOT / "docs" / "findings.md").read_text("utf-8")
    rows = re.findall(r"^\| `(quarkconv\.\w+/1)` \| ([^|]*) \| ([^|]*) ?\|$", text, re.MULTILINE)
    fields = {schema: [set(re.findall(r"`(\w+)`", column)) for column in columns] for schema, *columns in rows}
    model, trained = ROOT / "examples" / "qwen3_moe-quark0.13-f2f", ROOT / "examples" / "tiny_moe"
    out, size = tmp_path / "out", ["--max-shard-size", "300kB"]
    convert: list[Any] = ["convert", model, "--to", "fused-int8"]
    evaluated = [
        "--text",
        trained / "heldout.txt",
        "--window",
        "32",
        "--windows",
        "2",
        "--no-resume",
        "--device",
        "cpu",
    ]
    words: list[list[Any]] = [
        ["inspect", model], ["inspect", tmp_path / "nothing"], [*convert, "--out", out], [*convert, "--dry-run"],
        [*convert, "--out", tmp_path / "part", "--part", "1/2", *size],
        [*convert, "--out", tmp_path / "joined", "--join", *size], [*convert, "--out", tmp_path / "ranks", "--tp", "2"],
        ["verify", out, "--source", model, "--device", "cpu"], ["verify", out, "--part", "1/2", "--bytes-only"],
        ["evaluate", trained / "quark-ptpc_int8", *evaluated], ["engines"], ["tune", "--for", "vllm", "--print-folder"],
    ]  # fmt: skip
    monkeypatch.chdir(tmp_path)
    seen: dict[str, set[str]] = {}
    for line in words:
        value = Result(*run_cli(capsys, *line, "--json")).json
        schema = value.pop("schema")
        always, sometimes = fields[schema]
        if "ranks" in value:
            always = always - {"moe", "shards", "tensors", "pieces", "files"}
        assert always <= value.keys() <= always | sometimes, line
        seen.setdefault(schema, set()).update(value)
    assert fields.keys() - seen.keys() == {"quarkconv.uploads/1"}  # needs an object store
    unseen = {field for schema, found in seen.items() for field in set.union(*fields[schema]) - found}
    assert unseen == {"pushed", "tables", "tensor"}


def result(name: str) -> Any:
    return json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text("utf-8"))


def fastest_other(row: dict[str, Any]) -> float | None:
    """Microseconds of the fastest other implementation that was timed at this size in the same run."""
    times = [row.get(name) for name in ("vllm_default_us", "vllm_tuned_us", "humming_us")]
    return min((time for time in times if time is not None), default=None)


def test_the_figures_of_the_readme_were_measured() -> None:
    convert, headers, forward = result("convert")["cp"], result("headers"), result("moe-int8-nvidia-h200")
    rows = {row["command"]: row for row in convert["rows"]}
    ours, copy = rows["quarkconv"], rows["cp -r"]
    assert f"at disk speed, in {ours['peak_bytes'] / 1e6:.0f} MB of memory" in README
    seconds = f"{ours['wall_s']:.1f} s, where `cp -r` takes {copy['wall_s']:.1f} s"
    assert f"{convert['bytes'] / 1e9:.1f} GB in {seconds}" in README
    assert f"2-core VM, {convert['date']}" in README
    (inspect,) = (row for row in headers["rows"] if row["command"].startswith("quarkconv inspect"))
    assert f"in {inspect['wall_s']:.1f} s**: {headers['tensors']:,} tensors" in README
    assert headers["date"] == convert["date"]
    others = [(fastest_other(row), row["ours_us"]) for row in forward["rows"]]
    gains = [other / ours for other, ours in others if other is not None]
    assert f"run {statistics.geometric_mean(gains):.2f} times as fast" in README
    assert f"geometric mean of {len(gains)} sizes" in README
    assert forward["vllm"].startswith("0.33.")


@pytest.mark.parametrize("name", ["moe-int8-nvidia-h200", "moe-int8-nvidia-h100-80gb-hbm3"])
def test_each_size_of_the_forward_was_timed_once_by_a_run_that_is_named(name: str) -> None:
    found = result(name)
    cells = [(row["shape"], row["tokens"]) for row in found["rows"]]
    assert len(cells) == len(set(cells))
    assert {row["run"] for row in found["rows"]} == set(range(len(found["runs"])))
    assert found["date"] == max(run["date"] for run in found["runs"])


@pytest.mark.parametrize(("device", "table"), [("H100", "nvidia-h100-80gb-hbm3"), ("H200", "nvidia-h200")])
def test_a_device_is_called_tuned_as_of_its_table_of_launch_options(device: str, table: str) -> None:
    [row] = [row for row in result("kernel-devices")["rows"] if row["device"] == device]
    measured = json.loads((ROOT / "kernels" / "src" / "tables" / f"{table}.json").read_text("utf-8"))["measured"]
    assert row["tuned"] == measured["date"]
    assert row["ran"] >= row["tuned"]


def test_only_devices_with_a_table_of_launch_options_are_called_tuned() -> None:
    tuned = [row["device"] for row in result("kernel-devices")["rows"] if row["tuned"]]
    assert len(tuned) == len(list((ROOT / "kernels" / "src" / "tables").glob("*.json")))


def test_the_time_of_quantize_was_measured() -> None:
    found = result("convert")["quantize"]
    rows = {row["command"]: row for row in found["rows"]}
    fused, other = (rows[f"--quantize all --to {target}"] for target in ("fused-int8", "compressed-tensors"))
    prose = " ".join((ROOT / "docs" / "performance.md").read_text("utf-8").split())
    assert f"of {found['bytes'] / 1e9:.1f} GB of BF16 takes {fused['ratio']:.2f} times as long" in prose
    assert f"to `fused-int8`, {other['ratio']:.2f} times to `compressed-tensors`" in prose
    assert f"in {max(fused['peak_bytes'], other['peak_bytes']) / 1e6:.0f} MB" in prose
    assert f"{found['date']}, medians of {found['rounds']} rounds" in prose


def test_what_int8_and_planted_faults_cost_was_measured() -> None:
    found = result("evaluate-tiny")
    text = (ROOT / "docs" / "evaluation.md").read_text("utf-8")
    sound = found["sound"]
    for name, divergence in (("unquantized", None), ("dequantized", sound["dequantized"]), ("int8", sound)):
        assert f"| {name} | {evaluated(sound['perplexity'][name], divergence)}" in text
    for what in ("scales", "codes"):
        fault = found[f"shifted {what}"]
        worst = fault["worst"]["layers"][0]
        row = f"| {what} of expert 0 in layer 0 shifted by a row | {evaluated(fault['perplexity']['int8'], fault)}"
        assert f"{row} | {worst}, {fault['layers'][worst]['own']:.4f} |" in text
        expert = fault["worst"]["experts"][0]
        assert (expert["layer"], expert["expert"]) == (found["fault"]["layer"], found["fault"]["expert"]) == (0, 0)
    assert found["date"] in text
    scales, codes = found["shifted scales"], found["shifted codes"]
    prose = " ".join(README.split())
    values = [sound["perplexity"][name]["value"] for name in ("unquantized", "int8")]
    assert f"from perplexity {values[0]:.2f} to {values[1]:.2f}" in prose
    assert f"codes by a row, and perplexity is {codes['perplexity']['int8']['value']:.1f}." in prose
    times = scales["kl"]["mean"] / sound["kl"]["mean"]
    overlooked = scales["perplexity"]["int8"]["value"]
    assert f"{overlooked:.1f}: easy to overlook, but KL divergence is {times:.0f} times as large" in prose


def evaluated(perplexity: dict[str, float], divergence: dict[str, Any] | None) -> str:
    """Cells of the table in docs/evaluation.md."""
    value = f"{perplexity['value']:.4f} ± {perplexity['standard_error']:.4f}"
    if divergence is None:
        return f"{value} | |"
    return f"{value} | {divergence['kl']['mean']:.3g} | {divergence['agreement']['top1'] * 100:.2f} %"


def test_every_document_is_a_page_of_the_site() -> None:
    config = (ROOT / "mkdocs.yml").read_text("utf-8")
    pages = set(re.findall(r"([\w-]+\.md)$", config, re.MULTILINE))
    top = {path.name for path in ROOT.glob("*.md")} - {"README.md"} | {"index.md"}
    assert pages == top | {path.name for path in (ROOT / "docs").glob("*.md")}


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["version"]
    headings = re.findall(r"^## \[?([^\]\n ]+)\]?", (ROOT / "CHANGELOG.md").read_text("utf-8"), re.MULTILINE)
    assert headings[0] == "Unreleased"
    assert version in headings or headings == ["Unreleased"]


def test_ci_runs_every_target_of_tests() -> None:
    """What is too slow for `make test` has a target of its own, and CI runs that too."""
    depends = dict(re.findall(r"^([a-z-]+):(?! export)([^=#\n]*)##", (ROOT / "Makefile").read_text(), re.MULTILINE))
    tests = {name for name in depends if name.startswith("test")}
    assert {"test", "test-targets", "test-engines"} <= tests
    commands = re.findall(r"^ *(make [^>\n]*)", (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    called = {word for command in commands for word in command.split()}
    called |= {name for word in called & depends.keys() for name in depends[word].split()}
    assert tests <= called, tests - called
