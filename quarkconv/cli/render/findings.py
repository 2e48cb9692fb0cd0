"""Findings in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from rich.console import RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import STYLES, indented, printable
from quarkconv.findings import Finding, Severity

_MARKS: Final = {Severity.ERROR: "✗", Severity.WARNING: "!", Severity.INFO: "·"}
_NAMED: Final = 4
"""Most subjects named when findings that differ only in their subject are shown as one."""


def render_findings(findings: Iterable[Finding], *, every: bool = True) -> Iterator[RenderableType]:
    """Findings with code, subject, message and hint.

    Args:
        findings: in the order to show them.
        every: show each finding whole; else findings of one code and hint are shown as one, with their other subjects.
    """
    groups: dict[object, list[Finding]] = {}
    for number, item in enumerate(findings):
        groups.setdefault(number if every else (item.severity, item.code, item.hint), []).append(item)
    for first, *others in groups.values():
        code = (f"{_MARKS[first.severity]} {first.code}", STYLES[first.severity])
        if first.severity is Severity.INFO and first.subject in first.message:
            row = Table.grid(padding=(0, 2, 0, 0))
            row.add_row(Text(code[0], style=code[1], no_wrap=True), printable(first.message))
            yield Padding(row, (0, 0, 0, 2))
        else:
            yield indented(Text.assemble(code, f"  {printable(first.subject)}"), 2)
            yield indented(printable(first.message), 4)
        if others:
            names = [printable(item.subject) for item in others[:_NAMED]]
            more = [f"{len(others) - _NAMED:,} more"] if len(others) > _NAMED else []
            yield indented(f"also: {', '.join(names + more)}", 4)
        if first.hint:
            yield indented(f"→ {printable(first.hint)}", 4, "green")
