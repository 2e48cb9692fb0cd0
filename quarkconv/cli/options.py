"""Arguments and options of several commands."""

from __future__ import annotations

from typing import Annotated

import typer

Model = Annotated[
    str,
    typer.Argument(
        metavar="[MODEL]",
        help="Model directory, Hub repo id (org/name, org/name@revision), or s3://, gs://, az:// URL.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]
