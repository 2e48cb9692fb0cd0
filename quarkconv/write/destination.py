"""The interfaces of an output: before it is opened, while a conversion writes there, and of a shard in it.

An output is a directory, or objects below the URL of a store.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from quarkconv.plan.manifest import Manifest, WrittenFile, WrittenShard
from quarkconv.plan.pieces import OutputShard, SourceFile
from quarkconv.plan.shares import Share
from quarkconv.write.leases import LeaseStore
from quarkconv.write.source import Source


class ShardFile(Protocol):
    """A shard that is being written; it has its name when it is sealed."""

    @property
    def in_order(self) -> bool:
        """Whether blocks must be written one after the other, by one thread at a time."""

    def write(self, block: memoryview, offset: int) -> None:
        """Write whole pages at a page; the last block may be padded beyond the end of the shard."""

    def flush(self) -> None:
        """Send what is buffered on its way."""

    def seal(self) -> None:
        """Make the shard durable when all of it is written."""

    def close(self) -> None:
        """Discard the shard if it is not sealed."""


class Output(Protocol):
    """An output that no conversion of this process has opened."""

    @property
    def location(self) -> Path | str:
        """The directory, or the URL."""

    def finished(self, digest: str) -> Manifest | None:
        """The manifest that an earlier run of the same plan wrote; None where none has, or it is being deleted.

        Raises:
            SourceError: there is a manifest that cannot be read.
        """

    def has_begun(self) -> bool:
        """Whether it holds an unfinished conversion."""

    def begin(
        self, state: dict[str, Any], plan_files: list[str], *, needed: int, overwrite: bool
    ) -> AbstractContextManager[Destination]:
        """Begin or resume a conversion that one process carries out.

        Args:
            state: the identity of the conversion, of :func:`quarkconv.write.state.plan_state`.
            plan_files: the files that the plan will write.
            needed: bytes that the whole conversion writes.
            overwrite: whether an earlier output of quarkconv is deleted, finished or not.

        Raises:
            UsageError: the output holds other files, or another plan's unfinished work.
            WriteError: another process works there, the output cannot be written to, or the disk is full.
        """

    def join(
        self, state: dict[str, Any], plan_files: list[str], share: Share | None
    ) -> AbstractContextManager[Destination]:
        """Begin or resume a conversion that several processes carry out.

        Args:
            state, plan_files: as of :meth:`begin`.
            share: the share that this process writes; None where several may write any shard.

        Raises:
            UsageError: the output holds other files, or a conversion that was begun with something else.
            OutputBusyError: another process works on this share, or on the whole.
            WriteError: the output cannot be written to.
        """

    def rejoin(
        self, state: dict[str, Any], plan_files: list[str], shard: OutputShard
    ) -> AbstractContextManager[Destination]:
        """Go on with a conversion that was begun for processes that may write any shard, to write one.

        Args:
            state, plan_files: as of :meth:`begin`.
            shard: the only shard whose record is looked for.

        Errors as of :meth:`join`.
        """


class Destination(Protocol):
    """Where one conversion writes. Methods for shards are called from several threads."""

    @property
    def has_locks(self) -> bool:
        """Whether processes lock the output; the one that finishes it then needs it alone."""

    @property
    def streams(self) -> bool:
        """Whether one thread writes a shard from its beginning to its end."""

    @property
    def plan_digest(self) -> str:
        """Digest of the plan that is carried out."""

    def open(self, shard: OutputShard) -> ShardFile:
        """Begin to write a shard."""

    def record(self, shard: WrittenShard) -> bool:
        """Note the checksums of a sealed shard: a later run does not write it again.

        Returns:
            False where another worker has recorded the shard already.
        """

    def finished(self, shard: OutputShard) -> WrittenShard | None:
        """The record of a shard that was finished; None when it has to be written."""

    def is_listed(self, shard: OutputShard) -> bool:
        """Whether a shard seems finished, by the last look at the output; its record is not read.

        A record may be of an object that was replaced: :meth:`finished` decides.
        """

    def is_leased(self, shard: OutputShard) -> bool:
        """Whether another worker seems to write a shard; false where asking costs as much as taking the lease."""

    def read_records(self, shards: Iterable[OutputShard]) -> None:
        """Read the records of some shards at once; :meth:`finished` then answers without a request for each."""

    def finished_now(self, shard: OutputShard) -> bool:
        """Whether a shard is finished, also by another worker since the last look.

        Raises:
            UsageError: the conversion is finished.
        """

    def refresh(self) -> None:
        """Look again at what others have finished.

        Raises:
            UsageError: the conversion is finished.
        """

    def checks_hold(self, share: Share) -> bool:
        """Whether an earlier run recorded that the checks of a share hold."""

    def record_checks(self, share: Share) -> None:
        """Record that the checks of a share hold."""

    def shares(self) -> int:
        """The number of shares that the conversion was begun with; 1 for a whole one."""

    def leases(self) -> LeaseStore:
        """Where workers that write the same shards keep their leases.

        Raises:
            WriteError: the object store has no conditional writes.
        """

    def copy(self, file: SourceFile, sources: Source) -> WrittenFile:
        """Copy a file of the source as it is."""

    def write(self, name: str, data: bytes) -> None:
        """Write a small file of the output."""

    def publish(self, names: list[str], manifest: bytes) -> None:
        """Complete the output when all else is written: the manifest, then config.json, so that it becomes a model.

        Args:
            names: every file of the output.
            manifest: the bytes of the manifest.
        """

    def discard(self) -> None:
        """Remove everything that the conversion wrote: the source cannot be converted by this plan."""

    def require_space(self, nbytes: int, shards: tuple[OutputShard, ...]) -> None:
        """Refuse to write where there is not enough space.

        Args:
            nbytes: bytes still to be written.
            shards: the shards that will be written again from their beginning.
        """

    def discard_partial(self, shards: tuple[OutputShard, ...]) -> None:
        """Discard what a process that died has left of some shards that no process writes now."""

    def failures(self, left: Callable[[], int]) -> AbstractContextManager[None]:
        """Turn failures to write into errors with a hint.

        Args:
            left: returns the number of bytes still to be written.
        """
