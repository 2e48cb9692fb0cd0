"""The start of every run of a plan: the source is opened, compared with the plan, and identified."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

from quarkconv.files.base import Files
from quarkconv.files.local import LocalFiles
from quarkconv.headers.checkpoint import CONFIG_NAME, INDEX_NAME, MANIFEST_NAME
from quarkconv.plan.plan import Plan
from quarkconv.write.source import Source
from quarkconv.write.source_files import SourceFiles
from quarkconv.write.state import plan_state


def files_of(plan: Plan) -> list[str]:
    """The files that a plan writes."""
    names = [*(shard.file for shard in plan.shards), *(copy.name for copy in plan.copies)]
    return [*names, *(text.name for text in plan.texts), CONFIG_NAME, INDEX_NAME, MANIFEST_NAME]


@contextmanager
def opened(
    plan: Plan, digest: str, source: Path | Files, output: Path | str, *, shares: int | None = None
) -> Iterator[tuple[Source, dict[str, Any]]]:
    """The open source of a plan, and the identity of the conversion.

    Args:
        plan, digest: the plan and its digest.
        source: directory of the source, or its files wherever they are.
        output: the output directory, or its URL.
        shares: number of shares that the work is divided into; None where one process does all that is left.

    Raises:
        SourceError: the source is not the planned one.
    """
    with closing(open_source(source, plan)) as sources:
        sources.check_layout(plan)
        folder = source.root if isinstance(source, LocalFiles) else source
        name = str(folder.absolute() if isinstance(folder, Path) else folder)
        yield sources, plan_state(plan, digest, sources.state(), name, output, shares=shares)


def open_source(source: Path | Files, plan: Plan) -> Source:
    """Open the shards that a plan reads.

    Raises:
        SourceError: one cannot be opened, or has another size than planned.
    """
    if isinstance(source, Path):
        return SourceFiles(source, plan)
    if isinstance(source, LocalFiles):
        return SourceFiles(source.root, plan)
    from quarkconv.files.remote import RemoteFiles
    from quarkconv.write.remote_source import RemoteSource

    if not isinstance(source, RemoteFiles):
        raise TypeError(f"{type(source).__name__} cannot be converted from")
    return RemoteSource(source, plan)
