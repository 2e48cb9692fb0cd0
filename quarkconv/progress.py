"""How far a long operation has come.

Everything that reads, writes or computes for long takes a :class:`Progress` and reports one step after the other to it:
the headers of a model, its download, the bytes of a conversion.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final, Protocol, TypeVar

Item = TypeVar("Item")


class Progress(Protocol):
    """Receives how far an operation has come. Several threads may call the methods at the same time."""

    def step(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Begin a step; it ends where the next one begins.

        Args:
            name: the step, for people: ``Reading headers``.
            total: the amount of work; None where it is not known.
            unit: unit of ``total``: ``byte``, or another noun in the singular, such as ``shard``.
        """

    def advance(self, amount: int = 1) -> None:
        """Count work that has been done, in the unit of the step."""

    def note(self, text: str) -> None:
        """Show one line about finished work, such as the result of a layer."""


class Silent:
    """A :class:`Progress` that ignores everything."""

    def step(self, name: str, total: int | None = None, unit: str = "") -> None:
        """Do nothing."""

    def advance(self, amount: int = 1) -> None:
        """Do nothing."""

    def note(self, text: str) -> None:
        """Do nothing."""


SILENT: Final = Silent()


def counting(items: Iterable[Item], progress: Progress) -> Iterator[Item]:
    """The items; each counts as one unit of work when the next one is requested."""
    for item in items:
        yield item
        progress.advance()
