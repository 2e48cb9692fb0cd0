"""The working folder of an unfinished conversion, for readers."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import SourceError
from quarkconv.files.regular import read_regular

STAGING_NAME: Final = ".quarkconv"
"""Folder in an output directory that a conversion works in. The last step removes it."""
STATE_NAME: Final = "plan.json"
"""File in that folder: the conversion and its command."""
NOTES_NAME: Final = "notes"
"""Folder in that folder: a note for each finished shard."""
MAX_STATE_BYTES: Final = 2**24
_COMMAND: Final = ["quarkconv", "convert"]
_OPTIONS: Final = frozenset({"--to", "--out", "--max-shard-size", "--mtp"})


def refuse_unfinished(root: Path) -> None:
    """Refuse a directory that is an unfinished conversion, with its progress and the command that resumes it.

    Raises:
        SourceError: it has a working folder.
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
        "This directory is an unfinished conversion, not a model",
        code="conversion-unfinished",
        file=str(root),
        expected="a finished checkpoint",
        found=found,
        hint=f"{hint}: it resumes where it stopped",
    )


def read_state(path: Path) -> dict[str, Any] | None:
    """The recorded state of a conversion; None where the file is missing or invalid."""
    try:
        data = read_regular(path, MAX_STATE_BYTES)
        state = None if isinstance(data, int) else json.loads(data)
    except (OSError, ValueError, RecursionError):
        return None
    return state if isinstance(state, dict) else None


def _resuming(command: object) -> str | None:
    """The recorded command, if it is one that resumes a conversion. Any other came with an untrusted checkpoint."""
    if not isinstance(command, str) or not command.isprintable():
        return None
    try:
        words = shlex.split(command)
    except ValueError:
        return None
    options = {word for word in words if word.startswith("-")}
    return shlex.join(words) if words[:2] == _COMMAND and options <= _OPTIONS else None
