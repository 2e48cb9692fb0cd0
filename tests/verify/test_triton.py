"""verify with the Triton kernels: in the interpreter everywhere, compiled where there is a GPU."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support.exports import Checkpoints, Converted

import quarkconv

NAMES = [
    "qwen3_moe-quark0.13-f2f",
    "minimax_m2-quark0.13-f2f",
    "deepseek_v3-quark0.13-f2f",
    "mixtral-quark0.11-eager",
    "step3p5-like-3key_fused",
    "qwen3_moe-quark0.11-eager-int8_static",
]


INTERPRETED = """
import sys
sys.path.insert(0, sys.argv.pop(1))
from support.interpreter import prepare_interpreter, widen_vector_tiles
prepare_interpreter()
widen_vector_tiles(setattr)
from quarkconv.cli.main import run
run()
"""
"""The program with the interpreter of tests/kernels: an eighth of the time. Argument: the folder of tests."""


def release(package: str) -> tuple[int, ...]:
    return tuple(int(part) for part in importlib.metadata.version(package).split(".")[:2])


@pytest.mark.skipif(
    release("triton") < (3, 7) and release("numpy") >= (2, 4),
    reason="the interpreter before Triton 3.7 takes arrays of one element for numbers, which numpy 2.4 ended",
)
@pytest.mark.parametrize("name", ["minimax_m2-quark0.13-f2f", "qwen3_moe-quark0.11-eager-int8_static"])
def test_interpreted_kernels_verify_a_conversion(name: str, converted: Converted) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERPRETED, Path(__file__).parents[1], "verify", converted(name), "--json",
         "--device", "cpu", "--layers", "1", "--tokens", "5"],
        capture_output=True, text=True, check=False, env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(done.stdout)["numbers"]
    assert numbers["backend"] == "triton"
    assert numbers["layers"][0]["reached"] == 8


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("tokens", [1, 64, 700])
@pytest.mark.parametrize("name", NAMES)
def test_compiled_kernels_verify_a_conversion(
    name: str, tokens: int, checkpoints: Checkpoints, converted: Converted
) -> None:
    result = quarkconv.verify_checkpoint(converted(name), checkpoints(name), "cuda", tokens=tokens)
    assert result.problems == ()
    gpus = torch.cuda.device_count()
    assert result.numbers.device == ("cuda" if gpus == 1 else f"{gpus} x cuda")
    assert result.numbers.backend == "triton"
