"""Converted checkpoints to verify, and to damage."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

import quarkconv


@pytest.fixture(scope="session")
def converted(checkpoints: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Converts an export to fused-int8, once a session; tests must not write to the result."""
    folder = tmp_path_factory.mktemp("converted")

    def convert(name: str) -> Path:
        output = folder / name
        if not output.is_dir():
            quarkconv.convert_checkpoint(checkpoints(name), "fused-int8", output)
        return output

    return convert
