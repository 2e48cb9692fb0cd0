"""``quarkconv inspect``."""

from __future__ import annotations

from typing import Annotated

import typer

from quarkconv.cli.options import Json, Model, Quiet, Verbose
from quarkconv.cli.out import console, print_json, set_talk
from quarkconv.cli.progress import progress
from quarkconv.cli.reports import command_line, require_charts, write_report
from quarkconv.inspection.inspection import inspect_checkpoint


def inspect(
    model: Model = ".",
    json: Json = False,
    report: Annotated[
        str | None, typer.Option("--report", metavar="FILE.html", help="Also write an HTML report.")
    ] = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also read scales and zero points, never weights.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every finding and every engine, also those that do not run it.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Show what a checkpoint holds, where config.json contradicts it, and which engines run it.

    Reads headers only. Exits 1 if there is an error.

    \b
    quarkconv inspect ./model
    quarkconv inspect org/name@revision --json
    """
    set_talk(verbose=verbose, quiet=quiet)
    if report is not None:
        require_charts()
    with progress("Reading") as meter:
        inspection = inspect_checkpoint(model, deep=deep, reading=meter.reading)
    if report is not None:
        from quarkconv.report.inspection import inspection_report

        write_report(report, inspection_report(inspection, command_line()))
    if json:
        print_json(inspection.to_json())
    else:
        from quarkconv.cli.render.inspection import render_inspection

        console().print(render_inspection(inspection, everything=everything))
    return 0 if inspection.ok else 1
