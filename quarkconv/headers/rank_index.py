"""``ranks.json``: the index of a directory that holds a folder for each rank, instead of one model."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from quarkconv.errors import SourceError

RANKS_NAME: Final = "ranks.json"
"""Name of the index; it is written last."""


def refuse_ranks(root: Path) -> None:
    """Refuse a directory that holds the parts of several ranks, naming one of them.

    Raises:
        SourceError: it holds ``ranks.json``.
    """
    if not (root / RANKS_NAME).is_file():
        return
    folders = sorted(path.name for path in root.glob("rank-*-of-*") if path.is_dir())
    raise SourceError(
        "This directory holds the parts of several ranks, not one model",
        code="config-invalid",
        file=str(root),
        expected="a checkpoint",
        found=f"{RANKS_NAME} and {len(folders)} folders",
        hint=f"name one of them: {root / folders[0]}" if folders else "convert the model again",
    )
