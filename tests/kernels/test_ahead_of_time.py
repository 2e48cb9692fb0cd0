"""Every kernel compiles for every target, without a GPU: with its shared memory, matrix instruction, and no spills.

`make test` compiles one variant of each kernel for a target of NVIDIA and one of AMD; `make test-targets` compiles for
the others, with large tiles too, and every other variant for these two.
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import pytest

pytestmark = [pytest.mark.long(40), pytest.mark.timeout(1800)]
FEW = ("sm_90/few", "gfx942/few")
OTHERS = ("gfx1201", "sm_80", "gfx950", "sm_86", "gfx90a", "sm_89", "gfx1100", "sm_100", "sm_75", "sm_120")
THE_REST = {"sm_90/prefill+rich": 30, "gfx942/prefill+rich": 20}
PROCESSES = 2
"""Each compiles for its targets in turn."""

Run = Future[subprocess.CompletedProcess[str]]


def compile_for(targets: list[str], cache: Path) -> subprocess.CompletedProcess[str]:
    # A cache of its own, so that what is tested is this compiler and not an earlier result.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(Path(__file__).with_name("compile_ahead.py")), *targets]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1700, check=False)


@pytest.fixture(scope="module")
def compilations(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Run]]:
    """The targets whose tests were selected, divided among processes."""
    items = [item for item in request.session.items if item.path == request.path]
    selected = [str(item.callspec.params["word"]) for item in items if isinstance(item, pytest.Function)]
    with ThreadPoolExecutor(max_workers=PROCESSES) as pool:
        runs: dict[str, Run] = {}
        for number in range(PROCESSES):
            if targets := selected[number::PROCESSES]:
                runs |= dict.fromkeys(targets, pool.submit(compile_for, targets, tmp_path_factory.mktemp("cache")))
        yield runs


@pytest.mark.parametrize(
    ("word", "least"),
    [
        *((word, 12) for word in FEW),
        *(pytest.param(word, 12, marks=pytest.mark.targets) for word in OTHERS),
        *(pytest.param(word, least, marks=pytest.mark.targets) for word, least in THE_REST.items()),
    ],
)
def test_every_kernel_compiles_ahead_of_time(word: str, least: int, compilations: dict[str, Run]) -> None:
    done = compilations[word].result()
    found = re.search(rf"^{re.escape(word)}: (\d+) compilations$", done.stdout, re.MULTILINE)
    assert found, f"{done.stdout}\n{done.stderr}"
    assert int(found[1]) >= least
    product = "grouped_gate_up_gemv_kernel" if word == "sm_75" else "grouped_product_kernel"
    assert f"{word.partition('/')[0]} {product}" in done.stdout
