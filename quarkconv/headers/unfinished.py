"""The working folder of an unfinished conversion, for readers."""

from __future__ import annotations

import json
import os
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quarkconv.errors import SourceError
from quarkconv.files.regular import read_regular
from quarkconv.headers.file_names import MANIFEST_NAME

if TYPE_CHECKING:
    from quarkconv.files.remote import RemoteFiles

STAGING_NAME: Final = ".quarkconv"
"""Folder in an output directory that a conversion works in. The last step removes it."""
STATE_NAME: Final = "plan.json"
"""File in that folder: the conversion and its command."""
NOTES_NAME: Final = "notes"
"""Folder in that folder: a note for each finished shard."""
STATE_PATH: Final = f"{STAGING_NAME}/{STATE_NAME}"
"""The same file, from the output directory or URL."""
MAX_STATE_BYTES: Final = 2**24
_COMMAND: Final = ["quarkconv", "convert"]
_OPTIONS: Final = frozenset(
    {"--to", "--out", "--max-shard-size", "--quantize", "--exclude", "--scheme", "--mtp", "--tp", "--ep"}
)
"""Options of a recorded command that is repeated. ``--push`` is not among them: the folder may be a stranger's."""


def refuse_unfinished(root: Path) -> None:
    """Refuse a directory that is an unfinished conversion, with its progress and the command that resumes it.

    A working folder without plan.json beside a manifest is the rest of one that finished.

    Raises:
        SourceError: it has a working folder with a plan.json, or without a manifest beside it.
    """
    folder = root / STAGING_NAME
    if folder.is_dir() and (os.path.lexists(folder / STATE_NAME) or not (root / MANIFEST_NAME).is_file()):
        finished = sum(1 for _ in folder.glob(f"{NOTES_NAME}/*.json"))
        raise _unfinished("This directory is", str(root), read_state(folder / STATE_NAME), finished)


def refuse_unfinished_objects(files: RemoteFiles) -> None:
    """As :func:`refuse_unfinished`, for remote files; without plan.json their conversion is finished.

    Raises:
        SourceError: they have a plan.json.
    """
    size = files.size(STATE_PATH)
    if size is not None:
        state = None if size > MAX_STATE_BYTES else parse_state(files.read(STATE_PATH, 0, size))
        finished = sum(1 for name in files.entries if name.startswith(f"{STAGING_NAME}/{NOTES_NAME}/"))
        raise _unfinished("These objects are", str(files), state, finished)


def _unfinished(subject: str, file: str, state: dict[str, Any] | None, finished: int) -> SourceError:
    state = state or {}
    found = f"the working folder {STAGING_NAME}"
    if isinstance(state.get("shards"), int):
        found += f", with {finished} of {state['shards']} shards finished"
    command = _resuming(state.get("command"))
    hint = f"run `{command}` again" if command else "run the same `quarkconv convert` command again"
    return SourceError(
        f"{subject} an unfinished conversion, not a model",
        code="conversion-unfinished",
        file=file,
        expected="a finished checkpoint",
        found=found,
        hint=f"{hint}: it resumes where it stopped",
    )


def read_state(path: Path) -> dict[str, Any] | None:
    """The recorded state of a conversion; None where the file is missing or invalid."""
    try:
        data = read_regular(path, MAX_STATE_BYTES)
    except (OSError, ValueError):
        return None
    return None if isinstance(data, int) else parse_state(data)


def parse_state(data: bytes) -> dict[str, Any] | None:
    """A JSON object that a conversion recorded; None for anything else."""
    try:
        state = json.loads(data)
    except (ValueError, RecursionError):
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
