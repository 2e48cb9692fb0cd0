"""Progress on stderr: a spinner, then bars with rate and remaining time.

It appears after a second, on a terminal, without ``--quiet``. A separate thread draws it and imports what drawing
needs, so that short commands do not pay for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

from quarkconv.cli.out import console, printable
from quarkconv.text import plural, size

DELAY_SECONDS: Final = 1.0
"""Before progress appears."""
_INTERVAL: Final = 0.1
_BAR_WIDTH: Final = 24
_FULL_WIDTH: Final = 72
"""Columns of a terminal that has room for a bar beside the figures."""


class _Step(NamedTuple):
    name: str
    total: int | None
    unit: str


class Meter:
    """The progress of a command, shown or not. See :class:`quarkconv.progress.Progress`."""

    def __init__(self, name: str, *, shown: bool = False) -> None:
        self._lock = threading.Lock()
        self._step = _Step(name, None, "")
        self._done = 0
        self._shown = shown

    def step(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Begin a step."""
        with self._lock:
            self._step, self._done = _Step(name, total, unit), 0

    def advance(self, amount: int = 1) -> None:
        """Count work that has been done."""
        with self._lock:
            self._done += amount

    def note(self, text: str) -> None:
        """Show a line above the bar."""
        if self._shown:
            console(stderr=True).print(printable(text), style="dim", markup=False)

    def state(self) -> tuple[_Step, int]:
        """The current step, and the work that has been done of it."""
        with self._lock:
            return self._step, self._done


@contextmanager
def progress(name: str, *, shown: bool) -> Iterator[Meter]:
    """Show how far a command has come, until the context is left.

    Args:
        name: name of the first step.
        shown: whether anything is drawn.
    """
    meter = Meter(name, shown=shown)
    if not shown:
        yield meter
        return
    over = threading.Event()
    drawing = threading.Thread(target=_draw, args=(meter, over), name="quarkconv-progress", daemon=True)
    drawing.start()
    try:
        yield meter
    finally:
        over.set()
        drawing.join()


def _draw(meter: Meter, over: threading.Event) -> None:
    if over.wait(DELAY_SECONDS):
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    terminal = console(stderr=True)
    columns = (
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        *([BarColumn(_BAR_WIDTH)] if terminal.width >= _FULL_WIDTH else []),
        TextColumn("{task.fields[amount]}", markup=False),
        TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(compact=True),
    )
    bars = Progress(*columns, console=terminal, transient=True, auto_refresh=False)
    shown = meter.state()[0].name
    task = bars.add_task(shown, total=None, amount="", rate="")
    with suppress(OSError), bars:  # the terminal may have been closed
        while not over.wait(_INTERVAL):
            step, done = meter.state()
            if step.name != shown:  # each step has its own rate
                bars.remove_task(task)
                shown, task = step.name, bars.add_task(step.name, total=step.total, amount="", rate="")
            speed = bars.tasks[0].speed
            rate = "" if speed is None else _rate(step, speed)
            bars.update(task, total=step.total, completed=done, amount=_amount(step, done), rate=rate, refresh=True)


def _amount(step: _Step, done: int) -> str:
    if step.total is None:
        return ""
    if step.unit == "byte":
        return f"{size(done)} of {size(max(step.total, done))}"
    return f"{done:,} of {plural(max(step.total, done), step.unit)}"


def _rate(step: _Step, speed: float) -> str:
    return f"{size(int(speed))}/s" if step.unit == "byte" else f"{speed:.1f}/s"
