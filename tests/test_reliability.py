"""The tables of promises name tests that exist, and every test of a promise that they should name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
TABLES = {
    "## Promises": (ROOT / "tests" / "write", 26, ("test_killed.py", "test_interrupted.py", "test_source.py")),
    "## The Hub and the network": (ROOT / "tests" / "hub", 20, ("test_bad", "test_proxy.py", "test_xet.py")),
    "## Hostile inputs": (ROOT / "tests" / "hostile", 26, ("test_",)),
}
"""Heading -> where its tests are, the least number of rows, and the files of which the table must name every test."""


def names_in(path: Path) -> set[str]:
    """The tests in a file, as ``file::name``."""
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return {f"{path.name}::{node.name}" for node in functions if node.name.startswith("test_")}


@pytest.mark.parametrize("heading", TABLES)
def test_every_promise_is_held_by_a_test_that_exists(heading: str) -> None:
    folder, least, complete = TABLES[heading]
    text = (ROOT / "docs" / "reliability.md").read_text()
    section = text.partition(f"{heading}\n")[2].partition("\n## ")[0]
    rows = [line for line in section.splitlines() if line.startswith("|")][2:]
    assert len(rows) >= least
    existing = set().union(*map(names_in, folder.glob("test_*.py")))
    named = set()
    for row in rows:
        tests = set(re.findall(r"`(test_\w+\.py::\w+)`", row))
        assert tests, row
        assert tests <= existing, tests - existing
        named |= tests
    assert {test for test in existing if test.startswith(complete)} <= named
