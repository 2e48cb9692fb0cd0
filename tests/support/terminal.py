"""The program on a terminal: its standard error is one, its standard output may be."""

from __future__ import annotations

import os
import pty
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

from support.program import PROCESS_TIMEOUT

PROGRAM = """
import sys
from quarkconv.cli import progress
progress.DELAY_SECONDS = {delay}
from quarkconv.cli.main import run
run()
"""
CONTROL = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


class Shown(NamedTuple):
    """Exit code, standard output, and all that the terminal was sent."""

    code: int
    out: str
    terminal: str

    @property
    def lines(self) -> list[str]:
        """What the terminal showed at one time or another, line by line, without colours."""
        return [line for line in re.split(r"[\r\n]+", CONTROL.sub("", self.terminal)) if line.strip()]


def run_on_terminal(
    *arguments: str | Path,
    environment: dict[str, str],
    stderr: bool = True,
    delay: float = 0.1,
    interrupt_at: str | None = None,
) -> Shown:
    """Run the program with a terminal for its standard error, or with a pipe where ``stderr`` is false.

    Args:
        arguments: of the program.
        environment: beside PATH alone.
        stderr: whether its standard error is a terminal; it is its input in any case.
        delay: seconds before progress is shown.
        interrupt_at: a text that, once shown, is answered with Ctrl-C.
    """
    master, slave = pty.openpty()
    command = [sys.executable, "-c", PROGRAM.format(delay=delay), *map(str, arguments)]
    inherited = {"PATH": os.environ["PATH"], "TERM": "xterm-256color", "LANG": "C.UTF-8"}
    process = subprocess.Popen(
        command, stdin=slave, stdout=subprocess.PIPE, stderr=slave if stderr else subprocess.PIPE,
        env=inherited | environment, start_new_session=True,
        # A shell that starts the tests in the background may make them ignore it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(slave)
    seen = bytearray()

    def watch() -> None:
        waiting = interrupt_at is not None
        while True:
            try:
                data = os.read(master, 65536)
            except OSError:  # the other end is closed
                return
            if not data:
                return
            seen.extend(data)
            if waiting and interrupt_at is not None and interrupt_at.encode() in seen:
                waiting = False
                time.sleep(0.05)
                process.send_signal(signal.SIGINT)

    watcher = threading.Thread(target=watch)
    watcher.start()
    out, err = process.communicate(timeout=PROCESS_TIMEOUT)
    watcher.join()
    os.close(master)
    return Shown(process.returncode, out.decode(), bytes(seen).decode() if stderr else err.decode())
