"""The interface of a destination: a directory, or objects below the URL of a store."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol

from quarkconv.plan.manifest import WrittenFile, WrittenShard
from quarkconv.plan.pieces import OutputShard, SourceFile
from quarkconv.plan.shares import Share
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
        """Give up what is not sealed."""


class Destination(Protocol):
    """Where one conversion writes. Methods for shards are called from several threads."""

    @property
    def plan_digest(self) -> str:
        """Digest of the plan that is carried out."""

    def open(self, shard: OutputShard) -> ShardFile:
        """Begin to write a shard."""

    @property
    def location(self) -> Path | str:
        """The directory, or the URL."""

    def record(self, shard: WrittenShard) -> bool:
        """Note the checksums of a sealed shard: a later run does not write it again.

        Returns:
            False where another worker has recorded the shard already.
        """

    def finished(self, shard: OutputShard) -> WrittenShard | None:
        """The record of a shard that was finished; None when it has to be written."""

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

    def failures(self, left: Callable[[], int]) -> AbstractContextManager[None]:
        """Turn failures to write into errors with a hint.

        Args:
            left: returns the number of bytes still to be written.
        """
