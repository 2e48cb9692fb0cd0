"""The examples do what they say, and the commands in them exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from support.exports import ROOT
from support.program import PROCESS_TIMEOUT, run_cli

from quarkconv import convert_checkpoint

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


@pytest.mark.parametrize(("what", "times"), [("scales", (1.0, 1.1)), ("codes", (1.3, 100.0))])
def test_a_planted_fault_is_named_by_verify_and_by_evaluate(
    what: str, times: tuple[float, float], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trained = ROOT / "examples" / "tiny_moe"
    sound = convert_checkpoint(trained / "quark-ptpc_int8", "fused-int8", tmp_path / "sound").output
    floats = convert_checkpoint(trained / "quark-ptpc_int8", "bf16", tmp_path / "bf16").output
    words: list[str | Path] = [what, sound, tmp_path / "bad", "--layer", "0", "--expert", "6"]
    subprocess.run([sys.executable, ROOT / "examples" / "plant_fault.py", *words], timeout=PROCESS_TIMEOUT, check=True)
    code, out, _ = run_cli(capsys, "verify", tmp_path / "bad", "--bytes-only", "--json")
    names = {problem["tensor"] for problem in json.loads(out)["problems"]}
    suffix = "_scale" if what == "scales" else ""
    assert code == 1
    assert names == {f"model.layers.0.mlp.experts.{leaf}{suffix}" for leaf in ("gate_up_proj", "down_proj")}
    evaluate = ("--unquantized", floats, "--text", trained / "heldout.txt", "--window", "64", "--windows", "12")
    code, out, _ = run_cli(capsys, "evaluate", tmp_path / "bad", *evaluate, "--no-resume", "--max-kl", "0.01", "--json")
    found = json.loads(out)
    assert code == 1
    assert found["worst"]["layers"][0] == 0
    assert [found["worst"]["experts"][0][key] for key in ("layer", "expert")] == [0, 6]
    before, after = (found["perplexity"][name]["value"] for name in ("unquantized", "int8"))
    assert times[0] < after / before < times[1]  # perplexity hardly shows shifted scales


def commands(path: Path) -> list[list[str]]:
    text = path.read_text("utf-8")
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
    recipe = yaml.safe_load(RECIPE.read_text("utf-8"))
    steps = recipe["jobs"]["verify"]["steps"]
    assert any("quarkconv verify" in step.get("run", "") for step in steps)
    assert steps[-1]["if"] == "always()"
