"""Where an output goes: a directory, or the URL of an object store."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from quarkconv.headers.unfinished import STAGING_NAME
from quarkconv.plan.manifest import Manifest, finished_manifest
from quarkconv.write.destination import Destination
from quarkconv.write.output_directory import open_staging


def open_output(
    output: Path | str, state: dict[str, Any], plan_files: list[str], *, needed: int, overwrite: bool
) -> AbstractContextManager[Destination]:
    """Begin or resume a conversion that one process carries out.

    Args:
        output: the directory, created if it does not exist; or the URL.
        state: the identity of the conversion, of :func:`plan_state`.
        plan_files: the files that the plan will write.
        needed: bytes that the whole conversion writes.
        overwrite: whether an earlier output of quarkconv is deleted, finished or not.

    Raises:
        UsageError: the output holds other files, or another plan's unfinished work.
        WriteError: another process works there, the output cannot be written to, or the disk is full.
    """
    if isinstance(output, Path):
        return open_staging(output, state, plan_files, needed=needed, overwrite=overwrite)
    from quarkconv.write.object_destination import open_objects

    return open_objects(output, state, plan_files, overwrite=overwrite)


def has_begun(output: Path | str) -> bool:
    """Whether there is an unfinished conversion in an output."""
    if isinstance(output, Path):
        return (output / STAGING_NAME).is_dir()
    from quarkconv.write import object_destination

    return object_destination.has_begun(output)


def finished_output(output: Path | str, digest: str) -> Manifest | None:
    """The manifest that an earlier run of the same plan wrote; None without one, and where the run did not finish.

    Raises:
        SourceError: there is a manifest that cannot be read.
    """
    if isinstance(output, Path):
        return finished_manifest(output, digest)
    from quarkconv.write import object_destination

    manifest = object_destination.finished_manifest(output)
    return manifest if manifest is not None and manifest.plan == digest else None
