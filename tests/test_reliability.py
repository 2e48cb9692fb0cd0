"""The tables of promises name tests that exist, and every test of a promise that they should name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TESTS = ROOT / "tests"
TABLES = {
    "## Promises": (("write",), 26, ("test_killed.py", "test_interrupted.py", "test_source.py")),
    "## The Hub and the network": (("hub",), 20, ("test_bad", "test_proxy.py", "test_xet.py")),
    "## Parts and object stores": (("cloud", "convert", "verify"), 20, ()),
    "## Hostile inputs": (("hostile", "write"), 26, ("test_",)),
}
"""Heading -> the folders of its tests, the least number of rows, and the files of the first folder of which the table
must name every test."""


def names_in(path: Path) -> set[str]:
    """The tests in a file, as ``file::name``."""
    functions = (node for node in ast.parse(path.read_text("utf-8")).body if isinstance(node, ast.FunctionDef))
    return {f"{path.name}::{node.name}" for node in functions if node.name.startswith("test_")}


@pytest.mark.parametrize("heading", TABLES)
def test_every_promise_is_held_by_a_test_that_exists(heading: str) -> None:
    folders, least, complete = TABLES[heading]
    text = (ROOT / "docs" / "reliability.md").read_text("utf-8")
    section = text.partition(f"{heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= least
    existing = [set[str]().union(*map(names_in, (TESTS / folder).glob("test_*.py"))) for folder in folders]
    named = set()
    for row in rows:
        tests = set(re.findall(r"`(test_\w+\.py::\w+)`", row))
        assert tests, row
        assert tests <= set().union(*existing), row
        named |= tests
    assert {test for test in existing[0] if test.startswith(complete)} <= named
