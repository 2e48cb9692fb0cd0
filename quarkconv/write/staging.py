"""The output directory while a conversion is under way.

Everything is written to ``OUT/.quarkconv`` and moved up when all of it is complete, config.json last: until then the
directory has no config.json, and no engine takes it for a model. The folder holds

    plan.json          the identity of the conversion: a later run resumes only the same one
    lock               held while a process works here
    notes/NAME.json    the checksums of the pieces of a finished shard
    files/NAME         a file that is finished and on disk
    parts/NAME         a file that is being written
    share-K-of-N       held while a process works on a share; checked-K-of-N says that the checks of a share hold

A conversion in shares has a process for each, on one machine or several, all of which hold ``lock`` together.

A finished shard is never written again; everything else is, after a crash. Each step is on disk before the next one
relies on it: the data of a shard before its note, the note before the shard has its name, all files and their names
before the manifest, and the manifest before config.json.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from quarkconv.headers.file_names import CONFIG_NAME, MANIFEST_NAME
from quarkconv.headers.unfinished import NOTES_NAME, STAGING_NAME, STATE_NAME, read_state
from quarkconv.plan.manifest import WrittenFile, WrittenShard
from quarkconv.plan.pieces import OutputShard, SourceFile
from quarkconv.plan.shares import MAX_SHARES, Share
from quarkconv.write.durable import folders_of, sync_directory, write_and_sync, write_durably, writing
from quarkconv.write.leases import DirectoryLeases
from quarkconv.write.locks import remove_unlocked
from quarkconv.write.notes import note_of, written_of
from quarkconv.write.output_file import DirectWrites, OutputFile
from quarkconv.write.source import Source
from quarkconv.write.space import allocated, disk_full_explained, require_space
from quarkconv.write.state import JOINED


class Staging:
    """The working folder of one conversion. See :mod:`quarkconv.write.output_directory`.

    Args:
        output: the output directory.
        plan_digest: digest of the plan.
        worker: name of one of several workers that may write the same shard; empty where only one does.
    """

    has_locks: Final = True
    streams: Final = False

    def __init__(self, output: Path, plan_digest: str, *, worker: str = "") -> None:
        self.output = output
        self._worker = worker
        self.plan_digest = plan_digest
        self.folder = output / STAGING_NAME
        self.files = self.folder / "files"
        self.parts = self.folder / "parts"
        self.notes = self.folder / NOTES_NAME
        self._direct = DirectWrites()

    def open(self, shard: OutputShard) -> OutputFile:
        """Begin to write a shard."""
        return OutputFile(self.part(shard.file), shard.nbytes, self._direct, locked=self._worker != "")

    def part(self, name: str) -> Path:
        """The path of a file until it is finished; its folder exists."""
        path = self.parts / f"{name}{self._worker}"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, name: str) -> None:
        """Give a file that is complete and on disk its name."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.part(name), path)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file of the output, durably."""
        write_and_sync(self.part(name), data)
        self.finish(name)

    def record(self, shard: WrittenShard) -> bool:
        """Note the checksums of a shard that is complete and on disk, then give it its name.

        Of several workers that wrote the same shard, one gives it its name: link(2) fails where there is one already.
        """
        note = json.dumps(note_of(shard, self.plan_digest)).encode()
        write_durably(self.notes / f"{shard.file}.json", note, self._worker)
        named, part = self.files / shard.file, self.part(shard.file)
        named.parent.mkdir(parents=True, exist_ok=True)
        first = True
        try:
            if self._worker:
                os.link(part, named)
                part.unlink()
            else:
                os.replace(part, named)
        except FileExistsError:
            first = named.stat().st_size != shard.size
            if first:  # of a crash
                os.replace(part, named)
            else:
                part.unlink()
        sync_directory(self.files)
        return first

    def finished(self, shard: OutputShard) -> WrittenShard | None:
        """The record of a shard that an earlier run finished; None when it has to be written."""
        path = next((path for path in (self.files / shard.file, self.output / shard.file) if path.is_file()), None)
        if path is None or path.stat().st_size != shard.nbytes:
            return None
        return written_of(shard, read_state(self.notes / f"{shard.file}.json"), self.plan_digest)

    def is_listed(self, shard: OutputShard) -> bool:
        """Whether a shard is finished."""
        return self.finished(shard) is not None

    def is_leased(self, shard: OutputShard) -> bool:  # noqa: ARG002
        """False: a lease is a file that is looked at when it is taken."""
        return False

    def read_records(self, shards: Iterable[OutputShard]) -> None:
        """Do nothing: files are read when they are needed."""

    def finished_now(self, shard: OutputShard) -> bool:
        """Whether a shard is finished."""
        return self.finished(shard) is not None

    def refresh(self) -> None:
        """Do nothing: a directory shows what it holds."""

    def checks_hold(self, share: Share) -> bool:
        """Whether an earlier run recorded that the checks of a share hold."""
        return read_state(self._checked(share)) == {"plan": self.plan_digest}

    def record_checks(self, share: Share) -> None:
        """Record that the checks of a share hold."""
        write_durably(self._checked(share), json.dumps({"plan": self.plan_digest}).encode(), self._worker)

    def shares(self) -> int:
        """The number of shares that the conversion was begun with: 1 for a whole one, 0 for one with leases."""
        count = (read_state(self.folder / STATE_NAME) or {}).get("shares")
        return count if isinstance(count, int) and JOINED <= count <= MAX_SHARES else 1

    def leases(self) -> DirectoryLeases:
        """Leases in the working folder."""
        return DirectoryLeases(self.folder)

    def _checked(self, share: Share) -> Path:
        return self.folder / f"checked-{share.number}-of-{share.count}"

    def copy(self, file: SourceFile, sources: Source) -> WrittenFile:
        """Copy a file of the source as it is, durably."""
        written = sources.copy(file, self.part(file.name))
        self.finish(file.name)
        return written

    def require_space(self, nbytes: int, shards: tuple[OutputShard, ...]) -> None:
        """Refuse to write where there is not enough space.

        Raises:
            WriteError: there is less.
        """
        require_space(self.output, nbytes, allocated(self.parts / shard.file for shard in shards))

    def discard_partial(self, shards: tuple[OutputShard, ...]) -> None:
        """Remove what workers that died have left of some shards. A file without a worker is written again in place."""
        files = {shard.file for shard in shards}
        for path in list(self.parts.glob("*")):
            if path.name.rpartition(".")[0] in files:
                remove_unlocked(path)

    @contextmanager
    def failures(self, left: Callable[[], int]) -> Iterator[None]:
        """Turn failures to write into errors with a hint; missing bytes are counted when no thread runs."""
        with writing(self.folder), disk_full_explained(self.output, self._reclaimed, left):
            yield

    def _reclaimed(self) -> int:
        """Bytes of unfinished files that the next run writes again in their places; those of other workers are not."""
        return 0 if self._worker else allocated(self.parts.rglob("*"))

    def _sync(self, names: list[str]) -> None:
        """Make the names of finished files durable, moved up already or not."""
        for folder in folders_of(names):
            for root in (self.files, self.output):
                if (root / folder).is_dir():
                    sync_directory(root / folder)

    def publish(self, names: list[str], manifest: bytes) -> None:
        """Write the manifest, move the finished files up, and remove the working folder.

        The manifest follows when all other names are on disk, and config.json when the manifest's is.
        """
        self._sync([name for name in names if name != MANIFEST_NAME])
        self.write(MANIFEST_NAME, manifest)
        last = (MANIFEST_NAME, CONFIG_NAME)
        for stage in ([name for name in names if name not in last], *([name] for name in last)):
            for name in stage:
                staged, final = self.files / name, self.output / name
                final.parent.mkdir(parents=True, exist_ok=True)
                if staged.exists():
                    os.replace(staged, final)
            for folder in folders_of(stage):
                sync_directory(self.output / folder)
        # The state goes first: who finds a folder without it knows that the conversion is finished.
        (self.folder / STATE_NAME).unlink()
        sync_directory(self.folder)
        shutil.rmtree(self.folder, ignore_errors=True)  # another process may look into it, which then removes it
        sync_directory(self.output)

    def forget(self) -> None:
        """Remove what a conversion without a state left here: its source may have been another, of the same plan."""
        left = [path for path in (self.files, self.parts, self.notes, *self.folder.glob("checked-*")) if path.exists()]
        for path in left:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        if left:
            sync_directory(self.folder)

    def discard(self) -> None:
        """Remove the working folder, and the output directory if it holds nothing else."""
        shutil.rmtree(self.folder, ignore_errors=True)  # what is left will be resumed, or removed by the next run
        with suppress(OSError):
            self.output.rmdir()
