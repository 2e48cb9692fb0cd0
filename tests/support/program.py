"""The program, run in this process or in one of its own, and the files that it leaves."""

from __future__ import annotations

import hashlib
import logging
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Final

import pytest

PROCESS_TIMEOUT: Final = 240
"""Seconds after which a process counts as hanging: far more than any takes on a busy machine, less than a test may."""


def snapshot(folder: Path) -> dict[str, str]:
    """Every file below a folder with a hash of its bytes."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def run_cli(capsys: pytest.CaptureFixture[str], *args: str | Path) -> tuple[int, str, str]:
    """Run the program in this process: exit code, stdout, stderr."""
    from quarkconv.cli.main import main

    capsys.readouterr()
    handler, log = signal.getsignal(signal.SIGTERM), logging.getLogger("quarkconv")
    level, handlers = log.level, log.handlers
    try:
        with pytest.raises(SystemExit) as exit_info:
            main([str(arg) for arg in args])
    finally:
        signal.signal(signal.SIGTERM, handler)
        log.setLevel(level)  # as --verbose found it
        log.handlers = handlers
    captured = capsys.readouterr()
    code = exit_info.value.code
    assert isinstance(code, int)
    return code, captured.out, captured.err


def utf8_environment() -> dict[str, str]:
    """The environment for scripts that call ``main``, which leaves the encoding of stdout to the locale."""
    return os.environ | {"PYTHONIOENCODING": "utf-8"}


def start(script: str, *args: str | int | Path) -> subprocess.Popen[str]:
    """Start Python on a script, whose output is UTF-8 in any locale."""
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env=utf8_environment(),
    )
