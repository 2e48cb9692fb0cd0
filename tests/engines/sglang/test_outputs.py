"""What SGLang's layers of routed experts compute for each family: its kernel in Triton's interpreter (outputs.py)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, Final

import pytest
from engines.outputs import BOUND, WRONG
from engines.sglang.test_families import LOADED

FUNCTIONS: Final = {
    "gemma4": ("gelu_tanh", ["gelu_and_mul"]),  # without the approximation, which differs by 0.001
    "grok-2": ("gelu", ["gelu_and_mul"]),
    "kimi_k3": ("situ, beta 4, linear beta 25", []),  # SGLang's own code in torch
    "minimax_m3_vl": ("swigluoai, clamped at 7, alpha 1.702", []),
    "deepseek_v4": ("silu, clamped at 10", ["silu_and_mul_clamp 10.0"]),
    "glm5_next": ("silu, clamped at 10", ["silu_and_mul_clamp 10.0"]),
}
"""Families with another function than SiLU: the function, and what SGLang calls of what is compiled."""


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
    assert (found["activation"], found["compiled"], found["on_input"]) == (function, called, False)
