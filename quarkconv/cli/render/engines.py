"""The table of engines in a terminal, of ``inspect`` and ``engines``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import indented
from quarkconv.inspection.engine_facts import ENGINE_NAMES, EngineFact

_VERDICT_STYLES: Final = {
    "int8": "bold green",
    "w8a16": "yellow",
    "not checked": "dim",
    "wrong": "bold red",
    "fails": "red",
}
_HEAD: Final = ("Engines", "version", "checkpoint", "runs as")
_GAP: Final = 2
_NOTE_WIDTH: Final = 20
"""Columns that a short note needs beside its row; with less, notes go below their rows."""
_EVIDENCE_WIDTH: Final = 60
"""The same with conditions and evidence."""


class _Row(NamedTuple):
    """The cells under :data:`_HEAD`, and notes."""

    cells: tuple[str, ...]
    notes: list[str]


@dataclass(frozen=True)
class EngineTable:
    """Rows of the table of engines, grouped by engine; notes stand beside their rows, or below on a narrow terminal.

    Attributes:
        facts: the rows.
        evidence: show conditions and evidence too.
        stored: the form that is shown as "as it is".
    """

    facts: Sequence[EngineFact]
    evidence: bool = False
    stored: str | None = None

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        rows = list(self._rows())
        widths = [max(map(cell_len, column)) for column in zip(_HEAD, *(cells for cells, *_ in rows), strict=True)]
        room = options.max_width - sum(widths) - _GAP * len(widths)
        if room >= (_EVIDENCE_WIDTH if self.evidence else _NOTE_WIDTH):
            yield _beside(rows)
        else:
            yield from _below(rows, widths)

    def _rows(self) -> Iterator[_Row]:
        by_engine: dict[str, list[EngineFact]] = {}
        for fact in self.facts:
            by_engine.setdefault(fact.engine, []).append(fact)
        for engine, facts in by_engine.items():
            name = f"  {ENGINE_NAMES.get(engine, engine)}"
            for number, fact in enumerate(facts):
                yield self._row(fact, "" if number else name)

    def _row(self, fact: EngineFact, name: str) -> _Row:
        form = "as it is" if fact.form == self.stored else fact.form
        notes = [fact.remark] if fact.remark else []
        if self.evidence:
            notes += [f"only: {fact.only_for}"] if fact.only_for else []
            notes.append(f"evidence: {fact.proof}")
        return _Row((name, fact.version, form, fact.verdict), notes)


def _beside(rows: Sequence[_Row]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, _GAP, 0, 0), header_style="dim")
    for number, heading in enumerate(_HEAD):
        table.add_column(Text(heading, style=_head_style(number)), no_wrap=True)
    table.add_column("note", style="dim")
    for cells, notes in rows:
        table.add_row(*cells[:-1], Text(cells[-1], style=_VERDICT_STYLES[cells[-1]]), "\n".join(notes))
    return table


def _below(rows: Sequence[_Row], widths: Sequence[int]) -> Iterator[RenderableType]:
    yield _line(_HEAD, widths, [_head_style(number) for number in range(len(_HEAD))])
    for cells, notes in rows:
        yield _line(cells, widths, ["", "", "", _VERDICT_STYLES[cells[-1]]])
        yield from (indented(note, 2 * _GAP, "dim") for note in notes)


def _line(cells: Sequence[str], widths: Sequence[int], styles: Sequence[str]) -> Text:
    """Cells in columns, the last one without padding."""
    padded = [cell.ljust(width + _GAP) for cell, width in zip(cells[:-1], widths[:-1], strict=True)]
    return Text.assemble(*zip((*padded, cells[-1]), styles, strict=True))


def _head_style(number: int) -> str:
    return "dim" if number else "bold"
