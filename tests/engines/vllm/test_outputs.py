"""What vLLM's layers of routed experts compute for each family: its kernel in Triton's interpreter, see outputs.py."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from engines.outputs import BOUND, WRONG
from engines.vllm.test_families import LOADED

FUNCTIONS: Final = {
    "gemma4": ("gelu_tanh", ["gelu_tanh_and_mul"]),
    "kimi_k3": ("situ, beta 4, linear beta 25", ["situ_and_mul 4.0 25.0"]),
    "minimax_m3_vl": ("swigluoai, clamped at 7, alpha 1.702", ["silu_and_mul_with_clamp 7.0 1.702 1.0"]),
    "deepseek_v4": ("silu, clamped at 10", []),  # vLLM's own code in torch
    "glm5_next": ("silu, clamped at 10", []),
    "nemotron_h": ("relu2", []),
}
"""Families with another function than SiLU: the function, and what vLLM calls of what it compiles."""


@pytest.fixture(scope="module")
def outputs() -> dict[str, dict[str, Any]]:
    """What the program prints, by family."""
    program = Path(__file__).with_name("outputs.py")
    lines = subprocess.run(
        [sys.executable, str(program), *LOADED], check=True, capture_output=True, text=True
    ).stdout.splitlines()
    found = [json.loads(line) for line in lines if line.startswith("{")]
    return {each["family"]: each for each in found}


@pytest.mark.parametrize("family", LOADED)
def test_experts_compute_what_the_export_says(outputs: dict[str, dict[str, Any]], family: str) -> None:
    found = outputs[family]
    function, called = FUNCTIONS.get(family, ("silu", ["silu_and_mul"]))
    assert found.get("error", found) < BOUND
    assert found["other"] > WRONG * BOUND
    assert (found["experts"], found["activation"], found["compiled"]) == ("TritonExperts", function, called)
    assert found["on_input"] == (family == "llama4")
