"""Exports as they came and as they are converted, each made once for all tests of an engine."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

from engines.expected import Stacked
from support.exports import Checkpoints

import quarkconv

QUARK = "as exported"


class Forms:
    """Exports in every form: as they came, and converted to a target.

    Args:
        checkpoints: the exports.
        folder: receives the copies and the conversions.
        prepare: fills the copy of an export with content that the engine reads, and returns it.
    """

    def __init__(self, checkpoints: Checkpoints, folder: Path, prepare: Callable[[Path], Path]) -> None:
        self._folder = folder
        self.source = cache(lambda name: prepare(checkpoints.copy(name, folder / QUARK / name)))
        self.stacked = cache(lambda name: Stacked(self.source(name)))
        self._converted = cache(self._convert)

    def __call__(self, name: str, form: str) -> Path:
        """The checkpoint ``name`` as exported, or converted to the target ``form``."""
        return self.source(name) if form == QUARK else self._converted(name, form)

    def _convert(self, name: str, target: str) -> Path:
        out = self._folder / target / name
        return quarkconv.convert_checkpoint(self.source(name), target, out, max_shard_size=300_000, jobs=1).output
