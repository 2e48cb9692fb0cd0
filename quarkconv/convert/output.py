"""Where a conversion goes."""

from __future__ import annotations

import os
from pathlib import Path

from quarkconv.errors import UsageError
from quarkconv.files.urls import is_store_url, is_url, prefix_of, without_slash
from quarkconv.hub.locate import Located


def output_location(source: Located, suffix: str, out: str | Path | None) -> Path | str:
    """The directory of the output, or its URL in an object store.

    Raises:
        UsageError: it is empty; it would lie inside the source, or the source inside it; or the URL is that of a whole
            bucket, or of a service that is not written to.
    """
    if isinstance(out, str) and is_store_url(out):
        return _output_url(source, without_slash(out))
    if isinstance(out, str) and is_url(out):
        raise UsageError(
            "quarkconv does not write to this service",
            file=out,
            expected="a directory, or an s3://, gs:// or az:// URL",
            hint="convert to a directory, and upload it with the service's own tools (`hf buckets sync`)",
        )
    if out == "":
        raise UsageError("--out is empty", expected="a directory, or an s3://, gs:// or az:// URL")
    if out is not None:
        output = Path(out)
    elif source.name is not None:  # in the working directory, not inside the Hub's cache
        output = Path(f"{source.name}-{suffix}")
    else:
        directory = source.files.root
        named = directory if directory.name not in ("", "..") else Path(os.path.realpath(directory))
        if not named.name:
            raise UsageError("There is no default output for this model", file=str(directory), hint="give --out DIR")
        output = named.with_name(f"{named.name}-{suffix}")
    if source.directory is None:
        return output
    inner, outer = (Path(os.path.realpath(path)) for path in (output, source.directory))
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UsageError(
            "Source and output must not contain one another",
            file=str(output),
            expected=f"a directory outside {source.directory}",
            hint="give another --out",
        )
    return output


def folder_in(location: Path | str, name: str) -> Path | str:
    """The folder of a name in a directory, or below a URL."""
    return f"{location}/{name}" if isinstance(location, str) else location / name


def _output_url(source: Located, url: str) -> str:
    if not prefix_of(url):
        raise UsageError(
            "The output needs a path in the bucket",
            expected="a URL such as s3://bucket/path",
            found=repr(url)[:300],
        )
    inner, outer = f"{url}/", f"{source.origin}/"
    if inner.startswith(outer) or outer.startswith(inner):
        raise UsageError(
            "Source and output must not contain one another",
            file=url,
            expected=f"a URL outside {source.origin}",
            hint="give another --out",
        )
    return url
