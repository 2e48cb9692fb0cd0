"""Receivers of progress."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count

from quarkconv.progress import Silent


@dataclass(frozen=True)
class Step:
    """A step as it was begun, and its advances."""

    name: str
    total: int | None
    unit: str
    advances: list[int] = field(default_factory=list)


class Recorder(Silent):
    """Keeps every step."""

    def __init__(self) -> None:
        self.steps: list[Step] = []

    def step(self, name: str, total: int | None = None, unit: str = "") -> None:
        self.steps.append(Step(name, total, unit))

    def advance(self, amount: int = 1) -> None:
        self.steps[-1].advances.append(amount)

    def named(self, name: str) -> Iterator[Step]:
        """The steps of a name."""
        return (step for step in self.steps if step.name == name)


class Bytes(Silent):
    """Calls a function with the bytes of each advance."""

    def __init__(self, call: Callable[[int], object]) -> None:
        self._call = call

    def advance(self, amount: int = 1) -> None:
        self._call(amount)


class WhileWriting(Silent):
    """Calls a function with the bytes of each advance of a conversion, not while the source is read."""

    def __init__(self, call: Callable[[int], object]) -> None:
        self._call = call
        self._writing = False

    def step(self, name: str, total: int | None = None, unit: str = "") -> None:  # noqa: ARG002
        self._writing = name.startswith("Converting")

    def advance(self, amount: int = 1) -> None:
        if self._writing:
            self._call(amount)


class AfterAdvances(WhileWriting):
    """Calls a function once, at the advance of a conversion that so many others precede."""

    def __init__(self, before: int, act: Callable[[], object]) -> None:
        advances = count()
        super().__init__(lambda _: act() if next(advances) == before else None)


class FullDisk(AfterAdvances):
    """Fails a conversion after some advances as a full disk does."""

    def __init__(self, before: int) -> None:
        super().__init__(before, self._fail)

    def _fail(self) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


class Stop(AfterAdvances):
    """Fails a conversion after some advances with RuntimeError, "stop"."""

    def __init__(self, before: int) -> None:
        super().__init__(before, self._fail)

    def _fail(self) -> None:
        raise RuntimeError("stop")
