"""``quarkconv uploads``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from quarkconv.cli.options import Json, Quiet, Verbose
from quarkconv.cli.out import open_output

if TYPE_CHECKING:
    from rich.console import RenderableType


def uploads(
    url: Annotated[str, typer.Argument(metavar="URL", help="s3://bucket or s3://bucket/path.")],
    abort: Annotated[
        bool, typer.Option("--abort", help="Discard them. First stop conversions that write there.")
    ] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """List unfinished multipart uploads, which take space in a bucket and appear in no listing.

    A killed conversion leaves some; the same convert command discards them when it resumes.

    \b
    quarkconv uploads s3://bucket/path
    quarkconv uploads s3://bucket/path --abort
    """
    from quarkconv.cloud.uploads import abort_uploads, list_uploads

    output = open_output(json=json, verbose=verbose, quiet=quiet)
    found = list_uploads(url)
    if abort:
        abort_uploads(url, found)

    def render() -> RenderableType:
        from quarkconv.cli.render.uploads import render_uploads

        return render_uploads(found, aborted=abort)

    value = {
        "schema": "quarkconv.uploads/1",
        "url": url,
        "uploads": [upload.to_json() for upload in found],
        "aborted": abort,
    }
    output.show(value, render)
    return 0
