"""Where a conversion goes."""

from __future__ import annotations

from pathlib import Path

from quarkconv.errors import UsageError
from quarkconv.hub.locate import Located


def output_directory(source: Located, suffix: str, out: str | Path | None) -> Path:
    """The directory of the output.

    Raises:
        UsageError: it would lie inside the source, or the source inside it.
    """
    if out is not None:
        output = Path(out)
    elif source.name is not None:  # in the working directory, not inside the Hub's cache
        output = Path(f"{source.name}-{suffix}")
    else:
        directory = source.files.root
        named = directory if directory.name not in ("", "..") else directory.resolve()
        if not named.name:
            raise UsageError(
                "The output cannot lie beside this model", file=str(directory), hint="give a directory with --out"
            )
        output = named.with_name(f"{named.name}-{suffix}")
    if source.directory is None:
        return output
    inner, outer = output.resolve(), source.directory.resolve()
    if inner == outer or outer in inner.parents or inner in outer.parents:
        raise UsageError(
            "Source and output must not lie inside one another",
            file=str(output),
            expected=f"a directory outside of {source.directory}",
            hint="give another --out",
        )
    return output
