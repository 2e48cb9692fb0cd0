"""``quarkconv inspect``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Final

import typer

from quarkconv.cli.options import Json, Model, Quiet, Report, Verbose
from quarkconv.cli.out import open_output
from quarkconv.cli.progress import progress
from quarkconv.cli.reports import command_line, require_report, write_report
from quarkconv.inspection.inspection import Inspection, inspect_checkpoint

if TYPE_CHECKING:
    from rich.console import RenderableType

_KEPT: Final[list[Inspection]] = []
"""Results of this process. Freeing the headers of a large checkpoint, one object after the other, takes 10 ms."""


def inspect(
    model: Model = ".",
    json: Json = False,
    report: Report = None,
    deep: Annotated[bool, typer.Option("--deep", help="Also read scales and zero points, never weights.")] = False,
    everything: Annotated[
        bool, typer.Option("--all", help="Show every finding and engine, including engines that fail.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Show what a checkpoint holds and which engines run it.

    Compares config.json with the stored tensors, reading headers only. Exits 1 if there is an error.

    \b
    quarkconv inspect ./model
    quarkconv inspect org/name@revision --json
    """
    output = open_output(json=json, verbose=verbose, quiet=quiet)
    require_report(report)
    with progress("Reading", shown=output.shows_progress) as meter:
        inspection = inspect_checkpoint(model, deep=deep, progress=meter)
    _KEPT.append(inspection)
    if report is not None:
        from quarkconv.report.inspection import inspection_report

        write_report(report, inspection_report(inspection, command_line()))

    def render() -> RenderableType:
        from quarkconv.cli.render.inspection import render_inspection

        return render_inspection(inspection, everything=everything)

    output.show(inspection.to_json(), render)
    return 0 if inspection.ok else 1
