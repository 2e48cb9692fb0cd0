"""Every kernel compiles for every target, without a GPU: with its shared memory, matrix instruction, and no spills."""

import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

TARGETS = (
    *("sm_90", "gfx942", "sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"),
    *("gfx90a", "gfx950", "gfx1100", "gfx1201"),
)


def compile_for(target: str, cache: Path) -> subprocess.CompletedProcess[str]:
    # A cache of its own, so that what is tested is this compiler and not an earlier result.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    script = Path(__file__).with_name("compile_ahead.py")
    return subprocess.run(
        [sys.executable, str(script), target], env=environment, capture_output=True, text=True, timeout=280, check=False
    )


@pytest.fixture(scope="module")
def compilations(tmp_path_factory):
    """All targets, as many at a time as there are processors."""
    with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
        runs: dict[str, Future[subprocess.CompletedProcess[str]]] = {
            target: pool.submit(compile_for, target, tmp_path_factory.mktemp(target)) for target in TARGETS
        }
        yield runs


@pytest.mark.parametrize("target", TARGETS)
def test_compiles(target, compilations):
    done = compilations[target].result()
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    product = "grouped_gate_up_gemv_kernel" if target == "sm_75" else "grouped_product_kernel"
    assert f"{target} {product}" in done.stdout
