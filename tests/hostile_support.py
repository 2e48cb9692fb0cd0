"""Checkpoints that lie, and what must come of each: one clear answer, the right exit code, and nothing written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from builders import SECOND, Model, raw_file
from writing_support import run_cli

MEGABYTES = 500
"""What any command may take of memory, whatever it is given."""
MAX_MESSAGE = 20_000
"""Characters of an answer to a small checkpoint."""


class Verdict(NamedTuple):
    """What the commands said.

    Attributes:
        inspect: exit code of ``inspect``.
        codes: codes of the findings that are no mere information, or of the error.
        convert: exit code of ``convert``.
        error: what ``convert --json`` said when it refused.
    """

    inspect: int
    codes: list[str]
    convert: int
    error: dict[str, Any]


def spoilt(folder: Path, spoil: Callable[[Path], object]) -> Path:
    """A sound checkpoint, spoilt."""
    Model().write(folder)
    spoil(folder)
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
    """Inspect and convert a checkpoint, for people and as JSON; the answers must be harmless and nothing written."""
    before = listing(folder)
    out = folder.parent / "out"
    for arguments in (["inspect", folder], ["convert", folder, "--to", "fused-int8", "--out", out]):
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
    """A command that ran in a process of its own."""

    code: int
    stdout: str
    stderr: str
    seconds: float
    megabytes: float


def measured(*arguments: str | Path, cwd: Path | None = None, timeout: float = 60) -> Measured:
    """Run the program in a process of its own; its memory is the largest that it ever had."""
    command = [sys.executable, "-P", "-m", "quarkconv", *map(str, arguments)]
    started = time.perf_counter()
    with subprocess.Popen(command, cwd=cwd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        watch = threading.Timer(timeout, process.kill)
        watch.start()
        try:
            assert process.stdout is not None
            assert process.stderr is not None
            stdout, stderr = process.stdout.read(), process.stderr.read()
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
        finally:
            watch.cancel()
    seconds = time.perf_counter() - started
    return Measured(process.returncode, stdout, stderr, seconds, usage.ru_maxrss / 1024)
