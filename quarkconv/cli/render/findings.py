"""How findings look in a terminal."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Final

from rich.console import RenderableType
from rich.text import Text

from quarkconv.cli.out import STYLES, indented, printable
from quarkconv.findings import Finding, Severity

_MARKS: Final = {Severity.ERROR: "✗", Severity.WARNING: "!", Severity.INFO: "·"}


def render_findings(findings: Iterable[Finding]) -> Iterator[RenderableType]:
    """Of each finding its code and subject, what was found, and what to do."""
    for item in findings:
        style = STYLES[item.severity]
        head = Text.assemble((f"{_MARKS[item.severity]} {item.code}", style), f"  {printable(item.subject)}")
        yield indented(head, 2)
        yield indented(printable(item.message), 6)
        if item.hint:
            yield indented(f"→ {printable(item.hint)}", 6, "green")
