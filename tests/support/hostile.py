"""Hostile checkpoints, and the response to each: one clear message, the right exit code, nothing written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from support.model import SECOND, Model
from support.program import run_cli
from support.raw import raw_file

MEGABYTES = 500
"""Memory that a command may use on any input."""
MAX_MESSAGE = 20_000
"""Characters of output for a small checkpoint."""


class Verdict(NamedTuple):
    """The response of the commands to a checkpoint.

    Attributes:
        inspect: exit code of ``inspect``.
        codes: codes of the warnings and errors found, or of the one error.
        convert: exit code of ``convert``.
        error: the object that ``convert --json`` printed.
    """

    inspect: int
    codes: list[str]
    convert: int
    error: dict[str, Any]


def corrupted(folder: Path, corrupt: Callable[[Path], object]) -> Path:
    """Write a sound checkpoint and corrupt it."""
    Model().write(folder)
    corrupt(folder)
    return folder


def with_header(header: object, data: bytes = b"", *, length: int | None = None) -> Callable[[Path], object]:
    """Replaces the second shard of a checkpoint."""
    return lambda folder: (folder / SECOND).write_bytes(raw_file(header, data, length=length))


def listing(folder: Path) -> list[tuple[str, int, int, int]]:
    """Names, modes, sizes and times of everything below a folder."""
    rows = []
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        rows.append((str(path.relative_to(folder)), status.st_mode, status.st_size, status.st_mtime_ns))
    return rows


def judge(folder: Path, capsys: pytest.CaptureFixture[str]) -> Verdict:
    """Inspect and convert a checkpoint, as text and as JSON: output is safe to print, and nothing is written."""
    before = listing(folder)
    out = folder.parent / "out"
    convert: list[str | Path] = ["convert", folder, "--to", "fused-int8", "--out", out]
    for arguments in (["inspect", folder], convert):
        _, stdout, stderr = run_cli(capsys, *arguments)
        shown = stdout + stderr
        assert "Traceback" not in shown
        assert all(char.isprintable() or char == "\n" for char in shown), shown
        assert len(shown) < MAX_MESSAGE
    shutil.rmtree(out, ignore_errors=True)
    inspected, stdout, _ = run_cli(capsys, "inspect", folder, "--json")
    value = one_object(stdout)
    found = value.get("findings", [value])
    codes = [item["code"] for item in found if item.get("severity") != "info"]
    converted, stdout, _ = run_cli(capsys, "convert", folder, "--to", "fused-int8", "--out", out, "--json")
    error = one_object(stdout)
    if converted:
        assert not out.exists()
        assert error["exit_code"] == converted
        assert error["error"]
    assert listing(folder) == before
    return Verdict(inspected, codes, converted, error)


def one_object(stdout: str) -> dict[str, Any]:
    """The one JSON object on standard output, in printable ASCII."""
    assert stdout.count("\n") == 1
    assert stdout.strip().isascii()
    assert stdout.strip().isprintable()
    value = json.loads(stdout, parse_constant=pytest.fail)
    assert isinstance(value, dict)
    return value


class Measured(NamedTuple):
    """A command that ran in its own process: output, CPU seconds, peak memory."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    megabytes: float


_WATCH = """
import os, signal, subprocess, sys
child = subprocess.Popen(sys.argv[2:])
signal.signal(signal.SIGALRM, lambda *_: child.kill())
signal.alarm(int(sys.argv[1]))
_, status, usage = os.wait4(child.pid, 0)
print(os.waitstatus_to_exitcode(status), usage.ru_utime + usage.ru_stime, usage.ru_maxrss, file=sys.stderr)
"""
"""A small process that starts the command: a child starts with the peak memory of its parent."""


def measured(*arguments: str | Path, cwd: Path | None = None, timeout: int = 60) -> Measured:
    """Run the program in a process of its own, and end it after some seconds."""
    command = [
        sys.executable,
        "-c",
        _WATCH,
        str(timeout),
        sys.executable,
        "-P",
        "-m",
        "quarkconv",
        *map(str, arguments),
    ]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=True)
    stderr, _, last = done.stderr.rstrip("\n").rpartition("\n")
    code, seconds, kilobytes = last.split()
    return Measured(int(code), done.stdout, stderr, float(seconds), int(kilobytes) / 1024)
