"""A single file that a command writes beside its result, such as a report: checked before anything is computed."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from quarkconv.errors import UsageError, WriteError

_HEAD: Final = 1024


def require_writable(option: str, path: str | Path | None, mark: bytes) -> None:
    """Refuse a file that cannot be created, or that would replace a file of another kind.

    Args:
        option: the option that names the file.
        path: the file; None for none.
        mark: what the first bytes of such a file hold. An existing file without it is not replaced, nor a
            link, such as /dev/stdout.

    Raises:
        UsageError: the name is empty, or the file exists and is of another kind.
        WriteError: its folder does not exist, it is a folder itself, or it cannot be read.
    """
    if path is None:
        return
    file = Path(path)
    if not str(path):
        raise UsageError(f"{option} is empty", expected="a file to write")
    try:
        if not file.absolute().parent.is_dir():
            raise WriteError(f"The folder for {option} does not exist", file=str(path), hint="create it first")
        if file.is_dir():
            raise WriteError(f"The file for {option} is a directory", file=str(path), hint="name a file in it")
        if not file.is_symlink() and not file.exists():
            return
        if file.is_file() and not file.is_symlink():
            with file.open("rb") as existing:
                if mark in (head := existing.read(_HEAD)) or not head:
                    return
    except (OSError, ValueError) as error:
        raise WriteError(
            f"The file for {option} cannot be written", file=str(path), found=_reason(error), hint="name another file"
        ) from error
    raise UsageError(
        f"{option} would overwrite an unrelated file",
        file=str(path),
        expected="a new file, or an earlier one of the same command",
        hint="choose another name, or delete the file first",
    )


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror if isinstance(error, OSError) else None) or str(error)
