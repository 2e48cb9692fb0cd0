"""``ranks.json``: the index of a directory or URL that holds a folder for each rank, instead of one model."""

from __future__ import annotations

import fnmatch
from pathlib import Path
from typing import TYPE_CHECKING, Final

from quarkconv.errors import SourceError

if TYPE_CHECKING:
    from quarkconv.files.remote import RemoteFiles

RANKS_NAME: Final = "ranks.json"
"""Name of the index; it is written last."""
_FOLDERS: Final = "rank-*-of-*"


def refuse_ranks(root: Path) -> None:
    """Refuse a directory that holds the parts of several ranks, naming one of them.

    Raises:
        SourceError: it holds ``ranks.json``.
    """
    if (root / RANKS_NAME).is_file():
        raise _several("This directory holds", str(root), [path.name for path in root.glob(_FOLDERS) if path.is_dir()])


def refuse_rank_objects(files: RemoteFiles) -> None:
    """As :func:`refuse_ranks`, for remote files.

    Raises:
        SourceError: there is a ``ranks.json``.
    """
    if files.size(RANKS_NAME) is not None:
        inside = {name.partition("/")[0] for name in files.entries if "/" in name}
        raise _several("This URL holds", str(files), fnmatch.filter(inside, _FOLDERS))


def _several(subject: str, file: str, folders: list[str]) -> SourceError:
    return SourceError(
        f"{subject} the parts of several ranks, not one model",
        code="config-invalid",
        file=file,
        expected="a checkpoint",
        found=f"{RANKS_NAME} and {len(folders)} folders",
        hint=f"give one of them: {file}/{min(folders)}" if folders else "convert the model again",
    )
