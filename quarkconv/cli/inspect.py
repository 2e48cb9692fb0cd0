"""``quarkconv inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from quarkconv.api import inspect_checkpoint
from quarkconv.cli.console import console, print_json
from quarkconv.cli.options import Json, Model
from quarkconv.cli.reports import command_line, require_charts, write_report


def inspect(
    model: Model = ".",
    json: Json = False,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE.html", help="Also write the answer as one HTML file.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also read scales and zero points (never weights).")] = False,
) -> int:
    """Tell what a checkpoint really holds, where its config is wrong, and which engine runs it.

    Reads headers only. Exit code 1 when a finding of severity error is found.
    """
    if report is not None:
        require_charts()
    inspection = inspect_checkpoint(model, deep=deep)
    if report is not None:
        from quarkconv.report.inspection import inspection_report

        write_report(report, inspection_report(inspection, command_line()))
    if json:
        print_json(inspection.to_json())
    else:
        from quarkconv.cli.render_inspection import render_inspection

        console().print(render_inspection(inspection))
    return 0 if inspection.ok else 1
