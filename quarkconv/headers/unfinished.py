"""The working folder of a conversion that has not come to its end, as somebody who only reads sees it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import SourceError

STAGING_NAME: Final = ".quarkconv"
"""Folder inside an output directory in which a conversion is prepared; gone when it is finished."""
STATE_NAME: Final = "plan.json"
"""File in that folder that says what is being converted."""
NOTES_NAME: Final = "notes"
"""Folder in that folder with a note for each finished shard."""
_MAX_STATE_BYTES: Final = 2**24


def refuse_unfinished(root: Path) -> None:
    """Raise if a directory is an unfinished conversion, saying how far it came and how to resume it.

    Raises:
        SourceError: it is one.
    """
    folder = root / STAGING_NAME
    if not folder.is_dir():
        return
    state = _read_state(folder / STATE_NAME)
    found = f"the working folder {STAGING_NAME}"
    if isinstance(state.get("shards"), int):
        finished = sum(1 for _ in folder.glob(f"{NOTES_NAME}/*.json"))
        found += f", with {finished} of {state['shards']} shards finished"
    command = state.get("command")
    hint = f"run `{command}` again" if isinstance(command, str) else "run the same `quarkconv convert` command again"
    raise SourceError(
        "This directory is an unfinished conversion, not a model", code="conversion-unfinished",
        file=str(root), expected="a finished checkpoint", found=found, hint=f"{hint}: it resumes where it stopped",
    )  # fmt: skip


def _read_state(path: Path) -> dict[str, Any]:
    """What the conversion was begun with; empty when that cannot be told."""
    try:
        with open(path, "rb") as handle:
            state = json.loads(handle.read(_MAX_STATE_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return state if isinstance(state, dict) else {}
