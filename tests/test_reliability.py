"""The table of promises names tests that exist, and every test of a promise that it should name."""

from __future__ import annotations

import ast
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "tests" / "write"


def names_in(path: Path) -> set[str]:
    """The tests in a file, as ``file::name``."""
    functions = (node for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef))
    return {f"{path.name}::{node.name}" for node in functions if node.name.startswith("test_")}


def test_every_promise_is_held_by_a_test_that_exists() -> None:
    table = (ROOT / "docs" / "reliability.md").read_text().partition("## Promises")[2].partition("\n## ")[0]
    rows = [line for line in table.splitlines() if line.startswith("|")][2:]
    assert len(rows) > 25
    existing = set().union(*map(names_in, FOLDER.glob("test_*.py")))
    named = set()
    for row in rows:
        tests = set(re.findall(r"`(test_\w+\.py::\w+)`", row))
        assert tests, row
        assert tests <= existing, tests - existing
        named |= tests
    about_failures = ("test_killed.py", "test_interrupted.py", "test_source.py")
    assert {test for test in existing if test.startswith(about_failures)} <= named
