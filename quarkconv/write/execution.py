"""One execution of a plan: its source is opened and compared with it, its output begun, resumed or joined."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from quarkconv.files.arenas import trim_heaps
from quarkconv.files.base import Files
from quarkconv.files.local import LocalFiles
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.pieces import OutputShard
from quarkconv.plan.plan import Plan
from quarkconv.plan.shares import Share
from quarkconv.progress import SILENT, Progress
from quarkconv.write.destination import Output
from quarkconv.write.executor import Run
from quarkconv.write.source import Source
from quarkconv.write.source_files import SourceFiles
from quarkconv.write.state import JOINED, plan_state


@dataclass(frozen=True, slots=True)
class Execution:
    """A plan, and what carrying it out takes.

    Attributes:
        plan: what to do.
        digest: of the plan.
        source: the files of the source.
        output: where to write.
        jobs: number of threads that read and write.
        progress: counts the bytes that were written, or found written; one call at a time, from several threads.
    """

    plan: Plan
    digest: str
    source: Files
    output: Output
    jobs: int
    progress: Progress = SILENT

    @property
    def origin(self) -> str:
        """The source by the name under which another process opens it: a directory, ``org/name@commit``, or a URL."""
        return str(self.source.root.absolute() if isinstance(self.source, LocalFiles) else self.source)

    def silent(self) -> Execution:
        """The same execution without progress."""
        return replace(self, progress=SILENT)

    def finished(self) -> Manifest | None:
        """The manifest that an earlier run of the same plan wrote; None where none has finished.

        Raises:
            SourceError: there is a manifest that cannot be read.
        """
        return self.output.finished(self.digest)

    @contextmanager
    def opened(self) -> Iterator[Source]:
        """The source, opened and compared with the plan.

        Raises:
            SourceError: it is not the planned one.
        """
        with closing(open_source(self.source, self.plan)) as sources:
            sources.check_layout(self.plan)
            trim_heaps()
            yield sources

    @contextmanager
    def begun(self, sources: Source, *, needed: int = 0, overwrite: bool = False) -> Iterator[Run]:
        """Begin or resume, as the only process that works on the output.

        Args:
            sources: of :meth:`opened`.
            needed: bytes that the whole conversion writes.
            overwrite: whether an earlier output of quarkconv is deleted, finished or not.

        Raises:
            UsageError: the output holds other files, or another plan's unfinished work.
            WriteError: another process works there, the output cannot be written to, or the disk is full.
        """
        state, names = self._state(sources, None), self.plan.file_names()
        with self.output.begin(state, names, needed=needed, overwrite=overwrite) as destination:
            yield Run(self.plan, sources, destination, self.progress)

    @contextmanager
    def joined(self, sources: Source, share: Share | None = None) -> Iterator[Run]:
        """Begin or resume, as one of several processes that work on the output.

        Args:
            sources: of :meth:`opened`.
            share: the share that this process writes; None where several may write any shard.

        Raises:
            UsageError: the output holds other files, or a conversion that was begun with something else.
            OutputBusyError: another process works on this share, or on the whole.
            WriteError: the output cannot be written to.
        """
        state, names = self._state(sources, JOINED if share is None else share.count), self.plan.file_names()
        with self.output.join(state, names, share) as destination:
            yield Run(self.plan, sources, destination, self.progress)

    @contextmanager
    def rejoined(self, sources: Source, shard: OutputShard) -> Iterator[Run]:
        """Go on as one of several processes that may write any shard, to write one; errors as of :meth:`joined`."""
        state, names = self._state(sources, JOINED), self.plan.file_names()
        with self.output.rejoin(state, names, shard) as destination:
            yield Run(self.plan, sources, destination, self.progress)

    def _state(self, sources: Source, shares: int | None) -> dict[str, Any]:
        location = self.output.location
        return plan_state(self.plan, self.digest, sources.state(), self.origin, location, shares=shares)


def open_source(source: Files, plan: Plan, turn: Path | None = None) -> Source:
    """Open the shards that a plan reads.

    Args:
        source: the files of the source.
        plan: the plan.
        turn: see :class:`quarkconv.write.remote_source.RemoteSource`.

    Raises:
        SourceError: one cannot be opened, or has another size than planned.
    """
    if isinstance(source, LocalFiles):
        return SourceFiles(source.root, plan)
    from quarkconv.files.remote import RemoteFiles
    from quarkconv.write.remote_source import RemoteSource

    if not isinstance(source, RemoteFiles):
        raise TypeError(f"{type(source).__name__} cannot be converted from")
    return RemoteSource(source, plan, turn)
