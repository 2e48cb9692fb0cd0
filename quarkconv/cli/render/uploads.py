"""The output of ``uploads`` in a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import printable
from quarkconv.cloud.uploads import Upload
from quarkconv.text import plural, size


def render_uploads(uploads: Sequence[Upload], *, aborted: bool) -> RenderableType:
    """Unfinished uploads, and whether they were discarded."""
    if not uploads:
        return Text("No unfinished uploads.")
    table = Table.grid(padding=(0, 2))
    table.add_column(overflow="fold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    for upload in uploads:
        table.add_row(printable(upload.name), size(upload.nbytes), upload.started)
    total = f"{plural(len(uploads), 'unfinished upload')}, {size(sum(upload.nbytes for upload in uploads))}"
    closing = f"{total}: discarded" if aborted else f"{total}; --abort discards them"
    return Group(table, Text(closing, style="dim"))
