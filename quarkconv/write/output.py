"""The output at a location: a directory, or objects below the URL of a store."""

from __future__ import annotations

from pathlib import Path

from quarkconv.write.destination import Output
from quarkconv.write.output_directory import OutputDirectory


def output_at(location: Path | str) -> Output:
    """The output at a directory or a URL, whether anything is there or not."""
    if isinstance(location, Path):
        return OutputDirectory(location)
    from quarkconv.write.output_objects import OutputObjects

    return OutputObjects(location)
