"""Writing the HTML file of ``--report``."""

from __future__ import annotations

import os
import shlex
import sys
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Final

from quarkconv.errors import UsageError, WriteError
from quarkconv.files.written_file import require_writable

_MARK: Final = b"<title>quarkconv "
"""In the head of every report."""


def require_report(name: str | None) -> None:
    """Refuse a ``--report`` that cannot be written, before anything is computed; None is no report.

    Raises:
        UsageError: it would replace another file, or matplotlib is not installed, which draws its charts.
        WriteError: its folder does not exist.
    """
    if name is None:
        return
    require_writable("--report", name, _MARK)
    if find_spec("matplotlib") is None:
        raise UsageError(
            "The charts of a report need matplotlib",
            expected="matplotlib 3.9 or later",
            found="none",
            hint="pip install 'matplotlib>=3.9', or leave --report out",
        )


def command_line() -> str:
    """The command line, quoted for a shell."""
    return shlex.join(["quarkconv", *sys.argv[1:]])


def write_report(name: str, html: str) -> None:
    """Write a report atomically.

    Raises:
        WriteError: it cannot be written.
    """
    part = Path(f"{name}.{os.getpid()}.part")
    try:
        part.write_text(html, encoding="utf-8")
        os.replace(part, name)
    except OSError as error:
        with suppress(OSError):
            part.unlink()
        raise WriteError(
            "The report cannot be written",
            file=name,
            found=error.strerror or str(error),
            hint="give another --report, or leave it out",
        ) from error
