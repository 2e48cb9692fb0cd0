"""Exports and what they convert to, made once for all tests with vLLM."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import engines.vllm.loading  # noqa: F401  prepares vLLM for a machine without GPU, before any test imports it
import pytest
from engines.expected import Stacked
from engines.vllm.exports import prepare
from support.exports import Checkpoints

import quarkconv

QUARK = "as exported"


class Forms:
    """Exports in every form: as they came, and converted to a target."""

    def __init__(self, checkpoints: Checkpoints, folder: Path) -> None:
        self._checkpoints = checkpoints
        self._folder = folder
        self.stacked = cache(lambda name: Stacked(self.source(name)))
        self.source = cache(lambda name: prepare(checkpoints.copy(name, folder / QUARK / name)))
        self.converted = cache(self._convert)

    def __call__(self, name: str, form: str) -> Path:
        """The checkpoint ``name`` as exported, or converted to the target ``form``."""
        return self.source(name) if form == QUARK else self.converted(name, form)

    def _convert(self, name: str, target: str) -> Path:
        out = self._folder / target / name
        return quarkconv.convert_checkpoint(self.source(name), target, out, max_shard_size=300_000, jobs=1).output


@pytest.fixture(scope="session")
def forms(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Forms:
    """Checkpoints by export and form."""
    return Forms(checkpoints, tmp_path_factory.mktemp("forms"))
