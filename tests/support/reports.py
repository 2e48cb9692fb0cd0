"""Verifications of any size to draw, and a browser to look at the drawings."""

from __future__ import annotations

import functools
import math
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from quarkconv.verify.layer_results import Distance, LayerExperts, LayerNumbers, WeightError
from quarkconv.verify.results import BytesResult, NumbersResult, Problem, StructureResult, Verification
from support.program import PROCESS_TIMEOUT

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
needs_browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


def browse(folder: Path, html: str, *options: str, scheme: str = "light") -> str:
    """Open a page in a headless browser; its standard output.

    Args:
        folder: for the page, and for the browser's own files.
        html: the page.
        options: of the browser.
        scheme: ``dark`` for a reader who prefers that.
    """
    assert BROWSER is not None
    (folder / "page.html").write_text(html, "utf-8")
    dark = ["--blink-settings=preferredColorScheme=0"] if scheme == "dark" else []
    base = [BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={folder / 'profile'}", *dark]
    command = [*base, *options, (folder / "page.html").as_uri()]
    return subprocess.run(command, capture_output=True, encoding="utf-8", timeout=PROCESS_TIMEOUT, check=True).stdout


def distance(error: float, bound: float = 0.2) -> Distance:
    """A distance of that relative error."""
    return Distance(error, 1 - error * error / 2, -20 * math.log10(error), 9 * error, bound)


@functools.cache
def verification(layers: int, experts: int, problems: tuple[Problem, ...] = ()) -> Verification:
    """A verification of that size, with every field filled."""
    draw = random.Random(0)
    numbers = tuple(
        LayerNumbers(
            layer, f"model.layers.{layer}.mlp.experts", 64, "random: Gaussian", experts, experts, "softmax", "silu",
            distance(draw.uniform(1e-6, 1e-4)), distance(draw.uniform(0.018, 0.03)), distance(0.1), distance(0.03), 1.0,
        )
        for layer in range(layers)
    )  # fmt: skip
    seen = tuple(
        LayerExperts(
            layer, f"model.layers.{layer}.mlp.experts",
            tuple(draw.randrange(5) for _ in range(experts)), (1e-4,) * experts, (1e-3,) * experts,
            (0,) * 16 + (experts,) * 4 + (0,) * 20,
            {role: tuple(WeightError(draw.uniform(0.006, 0.012), 40.0, 0.0) for _ in range(experts))
             for role in ("gate", "up", "down")},
        )
        for layer in range(layers)
    )  # fmt: skip
    return Verification(
        "org/<model> & more", None, "org/original", "ptpc_int8", StructureResult(2, 100, True, True),
        BytesResult(100, 10**9), NumbersResult("cpu", "torch", (64,), 0, numbers, seen), problems,
    )  # fmt: skip
