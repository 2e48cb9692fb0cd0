"""The examples do what they say, and the commands in them exist."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.exports import ROOT
from support.program import PROCESS_TIMEOUT, run_cli

RECIPE = ROOT / "examples" / "ci" / "verify-checkpoint.yml"


def test_the_walk_through_runs() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "examples" / "prove_it.py"],
        capture_output=True,
        text=True,
        timeout=PROCESS_TIMEOUT,
        check=True,
    )
    assert "verified\n" in done.stdout
    assert done.stdout.count("tokens:") == 6


def commands(path: Path) -> list[list[str]]:
    text = path.read_text()
    return [match.split() for match in re.findall(r"^[ ]*(?:run: )?quarkconv ([^\n|>]*)", text, re.MULTILINE)]


@pytest.mark.parametrize("path", [RECIPE, ROOT / "docs" / "serving.md"], ids=lambda path: path.name)
def test_the_commands_exist(path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = commands(path)
    assert len(found) >= 2
    for words in found:
        code, out, _ = run_cli(capsys, words[0], "--help")
        assert code == 0
        for option in (word for word in words if word.startswith("--")):
            assert option in out, words


def test_the_recipe_is_a_workflow() -> None:
    recipe = yaml.safe_load(RECIPE.read_text())
    steps = recipe["jobs"]["verify"]["steps"]
    assert any("quarkconv verify" in step.get("run", "") for step in steps)
    assert steps[-1]["if"] == "always()"
