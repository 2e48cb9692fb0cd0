"""The working folder of a conversion that has not come to its end, as somebody who only reads sees it."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import SourceError
from quarkconv.files.regular import read_regular

STAGING_NAME: Final = ".quarkconv"
"""Folder inside an output directory in which a conversion is prepared; gone when it is finished."""
STATE_NAME: Final = "plan.json"
"""File in that folder that says what is being converted."""
NOTES_NAME: Final = "notes"
"""Folder in that folder with a note for each finished shard."""
MAX_STATE_BYTES: Final = 2**24
_COMMAND: Final = ["quarkconv", "convert"]
_OPTIONS: Final = frozenset({"--to", "--out", "--max-shard-size"})


def refuse_unfinished(root: Path) -> None:
    """Raise if a directory is an unfinished conversion, saying how far it came and how to resume it.

    Raises:
        SourceError: it is one.
    """
    folder = root / STAGING_NAME
    if not folder.is_dir():
        return
    state = read_state(folder / STATE_NAME) or {}
    found = f"the working folder {STAGING_NAME}"
    if isinstance(state.get("shards"), int):
        finished = sum(1 for _ in folder.glob(f"{NOTES_NAME}/*.json"))
        found += f", with {finished} of {state['shards']} shards finished"
    command = _resuming(state.get("command"))
    hint = f"run `{command}` again" if command else "run the same `quarkconv convert` command again"
    raise SourceError(
        "This directory is an unfinished conversion, not a model", code="conversion-unfinished",
        file=str(root), expected="a finished checkpoint", found=found, hint=f"{hint}: it resumes where it stopped",
    )  # fmt: skip


def read_state(path: Path) -> dict[str, Any] | None:
    """What a conversion was begun with; None when that cannot be told."""
    try:
        data = read_regular(path, MAX_STATE_BYTES)
        state = None if isinstance(data, int) else json.loads(data)
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


def _resuming(command: object) -> str | None:
    """The command that a state names, if it is one that resumes: a stranger may have written another for us to show."""
    if not isinstance(command, str) or not command.isprintable():
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    options = {word for word in words if word.startswith("-")}
    return shlex.join(words) if words[:2] == _COMMAND and options <= _OPTIONS else None
