"""``quarkconv merge``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final

import typer

from quarkconv.cli.options import Json, Quiet, Report, Verbose
from quarkconv.cli.out import open_output
from quarkconv.cli.reports import command_line, require_report, write_report
from quarkconv.errors import SourceError, UsageError
from quarkconv.files.json_files import read_json_object

if TYPE_CHECKING:
    from rich.console import RenderableType

_MAX_BYTES: Final = 2**30


def merge(
    files: Annotated[list[str], typer.Argument(metavar="FILE...", help="Outputs of `verify --part K/N --json`.")],
    report: Report = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Merge the results of `verify --part`.

    Exits 1 when anything is wrong in a part. All parts are needed.

    \b
    quarkconv verify MODEL --part 1/2 --json > part-1.json
    quarkconv verify MODEL --part 2/2 --json > part-2.json
    quarkconv merge part-*.json
    """
    from quarkconv.verify.merged import merged, verification_from_json

    require_report(report)
    value = merged({name: _read(name) for name in files})
    if report is not None:
        from quarkconv.report.verification import verification_report

        write_report(report, verification_report(verification_from_json(value), command_line()))

    def render() -> RenderableType:
        from quarkconv.cli.render.verification import render_verification

        return render_verification(verification_from_json(value))

    open_output(json=json, verbose=verbose, quiet=quiet).show(value, render)
    return 0 if value["ok"] else 1


def _read(name: str) -> dict[str, Any]:
    try:
        return read_json_object(Path(name), code="config-invalid", limit=_MAX_BYTES)
    except SourceError as error:
        raise UsageError(
            error.message, file=name, expected="what `quarkconv verify --part K/N --json` prints", found=error.found
        ) from error
