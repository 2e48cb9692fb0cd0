"""Fixtures of all tests: real exports and their conversions, created once a session; Triton's interpreter."""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest
from support.exports import Checkpoints, Converted

# Set before torch is imported, and for every process that a test starts. The threads of OpenMP spin while they wait,
# which costs other workers their processors: on two busy ones, the tests of verify take a sixth of the time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A draw may take any time: processors are shared with other tests, and speed is checked by the benchmarks.
# Environments of engines do not have hypothesis.
with contextlib.suppress(ImportError):
    from hypothesis import settings
    from support.examples import examples

    settings.register_profile("untimed", deadline=None, max_examples=examples(100), print_blob=True)
    settings.load_profile("untimed")


def _has_gpu() -> bool:
    """Whether a driver of NVIDIA or AMD shows a device, without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seeds", type=int, default=6, help="random seeds of the tests of verify's bounds")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without a GPU, Triton is imported for its interpreter.

    Triton decides when a function is decorated, those of its own library included, so the variable is set while test
    modules are imported, whichever of them comes first. It is unset before the tests run: outside of tests/kernels they
    take the torch path on CPU tensors.

    What is imported and collected stays until the end: the garbage collector need not look at it again and again.
    """
    before = os.environ.get("TRITON_INTERPRET")
    if not _has_gpu():
        os.environ["TRITON_INTERPRET"] = "1"
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest modules first, so that no worker ends with one."""

    def seconds(item: pytest.Item) -> int:
        mark = item.get_closest_marker("long")
        return 0 if mark is None else int(mark.args[0])

    items.sort(key=seconds, reverse=True)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_auto_num_workers() -> int:
    """Two workers more than processors: tests of disks, networks and terminals mostly wait."""
    return len(os.sched_getaffinity(0)) + 2


ON_DISK = ("write", "load", "files")
"""Packages whose tests write to a disk and read from it. Other files of tests may be in memory: see the Makefile."""


@pytest.fixture
def tmp_path(request: pytest.FixtureRequest) -> Iterator[Path]:
    """A folder of the test, on the disk for packages that write to one."""
    if request.path.parent.name not in ON_DISK:
        yield request.getfixturevalue("tmp_path")
        return
    with tempfile.TemporaryDirectory(prefix="quarkconv-tests-", ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def seeds(request: pytest.FixtureRequest) -> range:
    """The seeds that the bounds of verify are tested with."""
    return range(request.config.getoption("--seeds"))


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Real exports by name: those of tests/data/fixtures, tests/data/exports and examples."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def converted(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Converted:
    """Converts an export to fused-int8, once a session; tests must not write to the result."""
    from quarkconv import convert_checkpoint

    folder = tmp_path_factory.mktemp("converted")

    def convert(name: str) -> Path:
        output = folder / name
        if not output.is_dir():
            convert_checkpoint(checkpoints(name), "fused-int8", output)
        return output

    return convert
