"""Arguments and options of several commands."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import Annotated, Final

import typer

_ADDRESS: Final = re.compile(r"auto|local|(ray://)?[\w.-]+:\d+|ray://.+")

Model = Annotated[
    str,
    typer.Argument(
        metavar="[MODEL]",
        help="Directory, Hub repo id (org/name, org/name@revision), or s3://, gs://, az://, hf://buckets/, "
        "modelscope:// URL.",
    ),
]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="[ADDRESS]", help="Run on a Ray cluster: auto, local, HOST:PORT. [default: auto]"),
]
"""The parser knows no optional values: :func:`with_addresses` fills in the address that was left out."""
Device = Annotated[
    str, typer.Option("--device", metavar="auto|cpu|cuda", help="Where numbers are computed; cuda is every GPU.")
]
Report = Annotated[
    str | None, typer.Option("--report", metavar="FILE.html", help="Also write the result as one HTML file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Show the log on stderr.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Show no progress.")]


def with_addresses(words: list[str]) -> list[str]:
    """The words of a command line, with ``auto`` behind each ``--ray`` that no address follows."""
    filled = []
    for word, following in pairwise([*words, ""]):
        filled.append(word)
        if word == "--ray" and not _ADDRESS.fullmatch(following):
            filled.append("auto")
    return filled
