"""Checkpoints for the tests: real Quark exports, restored from what the repository keeps of them."""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Callable, Generator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT / "tests" / "data"

FIXTURES = {
    **{path.name: path for path in sorted((DATA / "fixtures").iterdir()) if path.is_dir()},
    "qwen3_moe-quark0.13-f2f": ROOT / "examples" / "qwen3_moe-quark0.13-f2f",
}
EXPORTS = {path.name: path for path in sorted((DATA / "exports").iterdir()) if path.is_dir()}


def restore(kept: Path, destination: Path) -> Path:
    """Copy an export, giving shards of which only the header is kept their size back, with zeros for data."""
    shutil.copytree(kept, destination)
    for header in destination.glob("*.safetensors.header"):
        raw = header.read_bytes()
        entries = json.loads(raw[8 : 8 + struct.unpack("<Q", raw[:8])[0]])
        data = max(entry["data_offsets"][1] for name, entry in entries.items() if name != "__metadata__")
        with header.with_suffix("").open("wb") as file:
            file.write(raw)
            file.truncate(len(raw) + data)
        header.unlink()
    return destination


def _has_gpu() -> bool:
    """Whether a driver of NVIDIA or AMD shows a device; asked without importing torch."""
    return any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Without a GPU, Triton is imported for its interpreter.

    Triton decides when a function is decorated, those of its own library included, so the variable is set while test
    modules are imported, whichever of them comes first. It is unset before the tests run: outside of tests/kernels they
    take the torch path on CPU tensors.
    """
    before = os.environ.get("TRITON_INTERPRET")
    if not _has_gpu():
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        return (yield)
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


class Checkpoints:
    """Restores exports by name, once a session; tests must not write to them (use :meth:`copy`)."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def __call__(self, name: str) -> Path:
        """A shared, read-only copy of the export ``name``."""
        path = self._folder / name
        return path if path.is_dir() else restore((FIXTURES | EXPORTS)[name], path)

    def copy(self, name: str, destination: Path) -> Path:
        """A copy of the export ``name`` that the test may change."""
        return restore((FIXTURES | EXPORTS)[name], destination)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Checkpoints:
    """Real exports by name: those of tests/data/fixtures, tests/data/exports and examples."""
    return Checkpoints(tmp_path_factory.mktemp("checkpoints"))


@pytest.fixture(scope="session")
def converted(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Converts an export to fused-int8, once a session; tests must not write to the result."""
    from quarkconv import convert_checkpoint

    folder = tmp_path_factory.mktemp("converted")

    def convert(name: str) -> Path:
        output = folder / name
        if not output.is_dir():
            convert_checkpoint(checkpoints(name), "fused-int8", output)
        return output

    return convert
