"""Every kernel compiles for every target, without a GPU: with its shared memory, matrix instruction, and no spills."""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long(80), pytest.mark.timeout(1800)]
GROUPS = (
    ("sm_90", "sm_75", "sm_80", "sm_86", "sm_89", "sm_100", "sm_120"),
    ("gfx942", "gfx90a", "gfx950", "gfx1100", "gfx1201"),
)
"""Targets of a vendor, which one process compiles for in turn."""


def compile_for(targets: tuple[str, ...], cache: Path) -> subprocess.CompletedProcess[str]:
    # A cache of its own, so that what is tested is this compiler and not an earlier result.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), *targets]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700, check=False)


@pytest.fixture(scope="module")
def compilations(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[dict[str, Future[subprocess.CompletedProcess[str]]]]:
    """All targets, each vendor's in a process of its own."""
    with ThreadPoolExecutor(max_workers=len(GROUPS)) as pool:
        runs: dict[str, Future[subprocess.CompletedProcess[str]]] = {}
        for group in GROUPS:
            runs |= dict.fromkeys(group, pool.submit(compile_for, group, tmp_path_factory.mktemp(group[0])))
        yield runs


@pytest.mark.parametrize("target", [target for group in GROUPS for target in group])
def test_compiles(target: str, compilations: dict[str, Future[subprocess.CompletedProcess[str]]]) -> None:
    done = compilations[target].result()
    found = re.search(rf"^{target}: (\d+) compilations$", done.stdout, re.MULTILINE)
    assert found, f"{done.stdout}\n{done.stderr}"
    assert int(found[1]) >= 12
    product = "grouped_gate_up_gemv_kernel" if target == "sm_75" else "grouped_product_kernel"
    assert f"{target} {product}" in done.stdout
