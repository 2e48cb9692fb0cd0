"""The page of a report: one self-contained HTML file, for light and dark screens, the keyboard and paper."""

from __future__ import annotations

import platform
import sys
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import cache
from html import escape
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final

from quarkconv.text import size

_SHORT: Final = 26
"""Characters up to which a cell stays on one line: names of engines, codes and targets, but not of tensors."""

Cell = str | int | float | None


class Bytes(int):
    """A number of bytes as a cell: shown as ``1.24 MB``, sorted as a number."""


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
        f"<style>{_asset('page.css')}</style>\n</head>\n<body>\n<main>\n<h1>{escape(subject)}</h1>\n{body}\n</main>\n"
        f"<script>{_asset('page.js')}</script>\n</body>\n</html>\n"
    )


@cache
def _asset(name: str) -> str:
    """The text of a file beside this module."""
    return Path(__file__).with_name(name).read_text("utf-8")


def verdict(text: str, *, good: bool) -> str:
    """The verdict, with a mark."""
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
    """A table. Numbers are right-aligned and sort as numbers; columns without any value are left out.

    Args:
        head: names of the columns.
        rows: a cell for each column.
        label: for screen readers.
        sortable: whether a click on a column's name sorts by it.
        captioned: whether the label is shown above.
    """
    rows = [list(row) for row in rows]
    kept = [at for at in range(len(head)) if not rows or any(row[at] not in (None, "") for row in rows)]
    numeric = {at for at in kept if rows and all(isinstance(row[at], int | float | None) for row in rows)}
    titles = "".join(
        f'<th scope="col"{" class=number" if at in numeric else ""}>'
        + (f"<button type=button>{escape(head[at])}</button>" if sortable else escape(head[at]))
        + "</th>"
        for at in kept
    )
    lines = ["<tr>" + "".join(_cell(row[at]) for at in kept) + "</tr>" for row in rows]
    kind = ' class="sortable"' if sortable else ""
    caption = f"<caption>{escape(label)}</caption>" if captioned else ""
    region = f' role="region" aria-label="{escape(label, quote=True)}" tabindex="0"'
    return (
        f'<div class="scroll"{region}><table{kind}>{caption}<thead><tr>{titles}</tr></thead>\n<tbody>'
        + "\n".join(lines)
        + "</tbody></table></div>"
    )


def about(command: str) -> str:
    """The command and the environment."""
    packages = ("quarkconv", "torch", "triton", "transformers", "safetensors", "huggingface_hub")
    rows: list[tuple[str, str]] = [
        ("command", command),
        ("date", datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC")),
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
    text = size(value) if isinstance(value, Bytes) else f"{value:,}" if isinstance(value, int) else f"{value:.4g}"
    return f'<td class="number" data-value="{value!r}">{text}</td>'
