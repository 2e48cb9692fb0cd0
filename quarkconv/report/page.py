"""The page of a report: one file, nothing fetched, light and dark, for the keyboard and for paper."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from importlib.metadata import PackageNotFoundError, version
from typing import Final

_STYLE: Final = """
:root { color-scheme: light dark; --ink: #1b1f24; --dim: #57606a; --paper: #ffffff; --line: #d0d7de; --good: #1a7f37;
  --bad: #b42318; --fill: #f6f8fa; --series-1: #0b5fad; --series-2: #b3470a; --series-3: #6b3fa0; --series-4: #1a7f37; }
@media (prefers-color-scheme: dark) { :root { --ink: #e6edf3; --dim: #9da7b3; --paper: #0d1117; --line: #30363d;
  --good: #56d364; --bad: #ff7b72; --fill: #161b22; --series-1: #6cb6ff; --series-2: #ffa657; --series-3: #d2a8ff;
  --series-4: #56d364; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem; background: var(--paper); color: var(--ink);
  font: 15px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; margin: 0; } h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
.dim { color: var(--dim); } .good { color: var(--good); } .bad { color: var(--bad); }
.verdict { font-size: 1.2rem; font-weight: 600; margin: 1rem 0; }
figure { margin: 1rem 0; color: var(--ink); overflow-x: auto; }
figure svg { width: 100%; min-width: 36rem; height: auto; display: block; }
figcaption, caption { font-weight: 600; text-align: left; position: sticky; left: 0; }
:focus-visible { outline: 2px solid var(--series-1); outline-offset: 3px; }
.scroll { overflow-x: auto; margin: .5rem 0 1rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: .25rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: normal; }
td.number, th.number { text-align: right; } td.number, td.short { white-space: nowrap; }
td.long { min-width: 11em; overflow-wrap: anywhere; }
th { background: var(--fill); vertical-align: bottom; } th button { all: unset; cursor: pointer; font-weight: 600; }
th button:focus-visible { outline: 2px solid var(--series-1); }
th[aria-sort=ascending] button::after { content: " \\25B2"; }
th[aria-sort=descending] button::after { content: " \\25BC"; }
@page { margin: 14mm 12mm; @bottom-right { content: counter(page) " / " counter(pages); font: 8pt sans-serif; } }
@media print { :root { color-scheme: light; --ink: #000; --dim: #444; --paper: #fff; --line: #bbb; --fill: #fff;
    --good: #1a7f37; --bad: #b42318; --series-1: #0b5fad; --series-2: #b3470a; --series-3: #6b3fa0;
    --series-4: #1a7f37; }
  body { max-width: none; padding: 0; font-size: 9.5pt; line-height: 1.35; }
  figure, .scroll { overflow: visible; } figure svg { min-width: 0; }
  th, td { padding: .15rem .4rem; } td.long { min-width: 0; } th button { display: contents; }
  figure, tr, thead, .scroll:not(:has(tbody tr:nth-child(13))) { break-inside: avoid; }
  h2, caption, thead, tbody tr:nth-child(-n+2) { break-after: avoid; }
  tbody tr:nth-last-child(-n+2) { break-before: avoid; } }
"""

_SCRIPT: Final = """
document.querySelectorAll("table.sortable th button").forEach((button) => button.addEventListener("click", () => {
  const head = button.parentElement, table = head.closest("table"), column = head.cellIndex;
  const up = head.getAttribute("aria-sort") === "descending";
  table.querySelectorAll("th").forEach((other) => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", up ? "ascending" : "descending");
  const value = (row) => { const cell = row.cells[column], text = cell.dataset.value ?? cell.textContent;
    const number = Number(text); return text !== "" && !Number.isNaN(number) ? number : text; };
  const rows = [...table.tBodies[0].rows].sort((a, b) => { const x = value(a), y = value(b);
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return up ? order : -order; });
  table.tBodies[0].append(...rows);
}));
"""

_SHORT: Final = 26
"""Characters up to which a text stays on one line: names of engines, codes and targets, not those of tensors."""

Cell = str | int | float | None


def page(title: str, subject: str, parts: Iterable[str]) -> str:
    """A whole page.

    Args:
        title: of the window.
        subject: the heading.
        parts: HTML.
    """
    body = "\n".join(parts)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{escape(title)}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<main>\n<h1>{escape(subject)}</h1>\n{body}\n</main>\n"
        f"<script>{_SCRIPT}</script>\n</body>\n</html>\n"
    )


def verdict(text: str, *, good: bool) -> str:
    """The line that says whether all is well."""
    mark, kind = ("✓", "good") if good else ("✗", "bad")
    return f'<p class="verdict {kind}">{mark} {escape(text)}</p>'


def section(title: str, *parts: str) -> str:
    """A part of the page under a heading."""
    return f"<section>\n<h2>{escape(title)}</h2>\n" + "\n".join(parts) + "\n</section>"


def table_section(title: str, head: Sequence[str], rows: Iterable[Sequence[Cell]], *, sortable: bool = False) -> str:
    """A part of the page that is a table."""
    return section(title, table(head, rows, sortable=sortable, label=title))


def paragraph(text: str) -> str:
    """Text."""
    return f'<p class="dim">{escape(text)}</p>'


def table(
    head: Sequence[str], rows: Iterable[Sequence[Cell]], *, label: str, sortable: bool = False, captioned: bool = False
) -> str:
    """A table; numbers are aligned to the right, and sorted as numbers. Columns without a value are left out.

    Args:
        head: names of the columns.
        rows: a cell for each column.
        label: what it shows, for those who do not see where it stands.
        sortable: whether a click on a column's name sorts the rows by it.
        captioned: whether the label is shown above.
    """
    rows = [list(row) for row in rows]
    kept = [at for at in range(len(head)) if not rows or any(row[at] not in (None, "") for row in rows)]
    numeric = {at for at in kept if rows and all(isinstance(row[at], int | float | None) for row in rows)}
    titles = "".join(
        f'<th scope="col"{" class=number" if at in numeric else ""}>'
        + (f"<button type=button>{escape(head[at])}</button>" if sortable else escape(head[at])) + "</th>"
        for at in kept
    )  # fmt: skip
    lines = ["<tr>" + "".join(_cell(row[at]) for at in kept) + "</tr>" for row in rows]
    kind = ' class="sortable"' if sortable else ""
    said = f"<caption>{escape(label)}</caption>" if captioned else ""
    region = f' role="region" aria-label="{escape(label, quote=True)}" tabindex="0"'
    return (
        f'<div class="scroll"{region}><table{kind}>{said}<thead><tr>{titles}</tr></thead>\n<tbody>'
        + "\n".join(lines) + "</tbody></table></div>"
    )  # fmt: skip


def about(command: str) -> str:
    """Environment and command."""
    packages = ("quarkconv", "torch", "triton", "safetensors", "huggingface_hub")
    rows: list[tuple[str, str]] = [
        ("command", command),
        ("made", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
        ("machine", f"{platform.system()} {platform.machine()}"),
        ("Python", sys.version.split()[0]),
        *((name, found) for name in packages if (found := _version(name)) is not None),
    ]
    return table_section("Environment", ("what", "value"), rows)


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cell(value: Cell) -> str:
    if value is None:
        return '<td class="number dim">-</td>'
    if isinstance(value, str):
        if len(value) <= _SHORT:
            return f'<td class="short">{escape(value)}</td>'
        # A name without spaces, such as a tensor's, breaks where its parts meet.
        text = escape(value) if " " in value else escape(value).replace(".", ".<wbr>")
        return f'<td class="long">{text}</td>'
    shown = f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="number" data-value="{value!r}">{shown}</td>'
