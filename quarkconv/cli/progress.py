"""What is under way, shown on stderr while it takes long: a spinner, then bars with rate and time left.

Nothing is shown before a second has passed, where stderr is no terminal, or with ``--quiet``. A thread of its own
draws, and imports what it needs for that, so that commands which are over at once pay nothing for it.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Final, NamedTuple

from quarkconv.cli.out import console, talkative
from quarkconv.files.base import Reading
from quarkconv.text import plural, size

PATIENCE: Final = 1.0
"""Seconds of silence that nobody minds."""
_INTERVAL: Final = 0.1
_BAR_WIDTH: Final = 24
_FULL_WIDTH: Final = 72
"""Columns of a terminal from which on there is room for a bar beside the figures."""
_STEPS: Final = {
    "list": "Asking the Hub",
    "headers": "Reading headers",
    "scales": "Reading scales",
    "download": "Downloading",
}


class _Step(NamedTuple):
    what: str
    total: int | None
    unit: str


class Meter:
    """How far a command has come. Used by several threads."""

    def __init__(self, what: str) -> None:
        self._lock = threading.Lock()
        self._step = _Step(what, None, "")
        self._done = 0

    def step(self, what: str, total: int | None = None, unit: str = "") -> None:
        """Begin something.

        Args:
            what: for people.
            total: how much there is to do; None where that is not known.
            unit: of ``total``: ``byte``, or a noun in the singular.
        """
        with self._lock:
            self._step, self._done = _Step(what, total, unit), 0

    def advance(self, amount: int = 1) -> None:
        """Say that so much more is done."""
        with self._lock:
            self._done += amount

    def reading(self, state: Reading) -> None:
        """Take over how far reading has come."""
        step = _Step(_STEPS[state.what], state.total, "byte" if state.in_bytes else "shard")
        with self._lock:
            self._step, self._done = step, state.done

    def state(self) -> tuple[_Step, int]:
        """What is under way, and how much of it is done."""
        with self._lock:
            return self._step, self._done


@contextmanager
def progress(what: str) -> Iterator[Meter]:
    """Show how far a command has come, until the context is left.

    Args:
        what: what it begins with, for people.
    """
    meter = Meter(what)
    if not talkative():
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
    if over.wait(PATIENCE):
        return
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeRemainingColumn

    terminal = console(stderr=True)
    columns = (
        SpinnerColumn(), TextColumn("{task.description}", markup=False),
        *([BarColumn(_BAR_WIDTH)] if terminal.width >= _FULL_WIDTH else []),
        TextColumn("{task.fields[amount]}", markup=False), TextColumn("{task.fields[rate]}", markup=False),
        TimeRemainingColumn(compact=True),
    )  # fmt: skip
    bars = Progress(*columns, console=terminal, transient=True, auto_refresh=False)
    shown = meter.state()[0].what
    task = bars.add_task(shown, total=None, amount="", rate="")
    with suppress(OSError), bars:  # a terminal that was closed meanwhile is no reason to stop
        while not over.wait(_INTERVAL):
            step, done = meter.state()
            if step.what != shown:  # a rate is that of one thing, not of several one after the other
                bars.remove_task(task)
                shown, task = step.what, bars.add_task(step.what, total=step.total, amount="", rate="")
            speed = bars.tasks[0].speed
            bars.update(
                task, total=step.total, completed=done, amount=_amount(step, done),
                rate="" if speed is None else _rate(step, speed), refresh=True,
            )  # fmt: skip


def _amount(step: _Step, done: int) -> str:
    if step.total is None:
        return ""
    if step.unit == "byte":
        return f"{size(done)} of {size(step.total)}"
    return f"{done:,} of {plural(step.total, step.unit)}"


def _rate(step: _Step, speed: float) -> str:
    return f"{size(int(speed))}/s" if step.unit == "byte" else f"{speed:.1f}/s"
