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

import fcntl
import json
import os
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import SourceError, UsageError, WriteError
from quarkconv.files.regular import walk
from quarkconv.headers.checkpoint import CONFIG_NAME, MANIFEST_NAME
from quarkconv.headers.unfinished import NOTES_NAME, STAGING_NAME, STATE_NAME, read_state
from quarkconv.plan.fields import are_checksums
from quarkconv.plan.manifest import WrittenPiece, WrittenShard, WrittenTensor, read_manifest
from quarkconv.plan.pieces import OutputShard
from quarkconv.plan.shares import MAX_SHARES, Share
from quarkconv.text import shortened
from quarkconv.write.durable import folders_of, sync_directory, write_and_sync, write_durably, writing
from quarkconv.write.space import allocated, require_space
from quarkconv.write.state import difference

LOCK_NAME: Final = "lock"
_MAX_DEPTH: Final = 100


class OutputBusyError(WriteError):
    """Another process works on the output."""


class Staging:
    """The working folder of one conversion. Use :func:`open_staging` to get one."""

    def __init__(self, output: Path, plan_digest: str) -> None:
        self.output = output
        self.plan_digest = plan_digest
        self.folder = output / STAGING_NAME
        self.files = self.folder / "files"
        self.parts = self.folder / "parts"
        self.notes = self.folder / NOTES_NAME

    def part(self, name: str) -> Path:
        """The path of a file until it is finished; its folder exists."""
        path = self.parts / name
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

    def record(self, shard: WrittenShard) -> None:
        """Note the checksums of a shard that is complete and on disk, then give it its name."""
        checksums = [[written.checksum for written in tensor.pieces] for tensor in shard.tensors]
        note = {"plan": self.plan_digest, "header": shard.header_checksum, "pieces": checksums}
        write_durably(self.notes / f"{shard.file}.json", json.dumps(note).encode())
        self.finish(shard.file)
        sync_directory(self.files)

    def finished(self, shard: OutputShard) -> WrittenShard | None:
        """The record of a shard that an earlier run finished; None when it has to be written."""
        path = next((path for path in (self.files / shard.file, self.output / shard.file) if path.is_file()), None)
        if path is None or path.stat().st_size != shard.nbytes:
            return None
        try:
            note = read_state(self.notes / f"{shard.file}.json") or {}
            if note["plan"] != self.plan_digest or not are_checksums([note["header"]]):
                return None
            if not all(map(are_checksums, note["pieces"])):
                return None
            tensors = tuple(
                WrittenTensor(
                    tensor.name,
                    tensor.dtype,
                    tensor.shape,
                    tuple(WrittenPiece(*pair) for pair in zip(tensor.pieces, checksums, strict=True)),
                )
                for tensor, checksums in zip(shard.tensors, note["pieces"], strict=True)
            )
            return WrittenShard(shard.file, shard.nbytes, shard.header, note["header"], tensors)
        except (ValueError, KeyError, TypeError):
            return None

    def checks_hold(self, share: Share) -> bool:
        """Whether an earlier run recorded that the checks of a share hold."""
        return read_state(self._checked(share)) == {"plan": self.plan_digest}

    def record_checks(self, share: Share) -> None:
        """Record that the checks of a share hold."""
        write_durably(self._checked(share), json.dumps({"plan": self.plan_digest}).encode())

    def shares(self) -> int:
        """The number of shares that the conversion was begun with; 1 for a whole one."""
        count = (read_state(self.folder / STATE_NAME) or {}).get("shares")
        return count if isinstance(count, int) and 1 <= count <= MAX_SHARES else 1

    def _checked(self, share: Share) -> Path:
        return self.folder / f"checked-{share.number}-of-{share.count}"

    def sync(self, names: list[str]) -> None:
        """Make the names of finished files durable, moved up already or not."""
        for folder in folders_of(names):
            for root in (self.files, self.output):
                if (root / folder).is_dir():
                    sync_directory(root / folder)

    def publish(self, names: list[str]) -> None:
        """Move the finished files up, and remove the working folder.

        The manifest follows when all other names are on disk, and config.json when the manifest's is.
        """
        last = (MANIFEST_NAME, CONFIG_NAME)
        for stage in ([name for name in names if name not in last], *([name] for name in last)):
            for name in stage:
                staged, final = self.files / name, self.output / name
                final.parent.mkdir(parents=True, exist_ok=True)
                if staged.exists():
                    os.replace(staged, final)
            for folder in folders_of(stage):
                sync_directory(self.output / folder)
        shutil.rmtree(self.folder)
        sync_directory(self.output)


@contextmanager
def open_staging(
    output: Path, state: dict[str, Any], plan_files: list[str], *, needed: int, overwrite: bool
) -> Iterator[Staging]:
    """Create or resume the working folder of a conversion, and hold its lock.

    Args:
        output: the output directory; created if it does not exist.
        state: the identity of the conversion, of :func:`plan_state`.
        plan_files: the files that the plan will write.
        needed: bytes that the whole conversion writes.
        overwrite: whether an earlier output of quarkconv is deleted, finished or not.

    Raises:
        UsageError: the directory holds other files, or another plan's unfinished work.
        WriteError: another process works there, the directory cannot be created, or the disk is full.
    """
    staging = Staging(output, state["plan"])
    with writing(output):
        if output.exists() and not output.is_dir():
            raise UsageError(
                "The output is a file",
                file=str(output),
                expected="a new or empty directory",
                hint="choose another --out",
            )
        output.mkdir(parents=True, exist_ok=True)
        refuse_links(output)
        if not overwrite:
            refuse_foreign(staging, plan_files)
        descriptor, created = _lock(staging)
    try:
        try:
            with writing(output):
                if overwrite:
                    _start_anew(staging, needed)
                else:
                    refuse_foreign(staging, plan_files)
                resume_or_begin(staging, state)
        except BaseException:
            if created:  # nothing has begun, so nothing is unfinished
                shutil.rmtree(staging.folder, ignore_errors=True)
            raise
        for folder in (staging.folder, output, output.absolute().parent):
            with suppress(OSError):  # a folder of another owner, who makes its names durable
                sync_directory(folder)
        yield staging
    finally:
        os.close(descriptor)


def resume_or_begin(staging: Staging, state: dict[str, Any]) -> None:
    """Note the identity of the conversion, or refuse to resume another one."""
    path = staging.folder / STATE_NAME
    if not path.is_file():
        write_durably(path, json.dumps(state).encode())
        return
    found = difference(read_state(path), state)
    if found is not None:
        raise UsageError(
            "The output directory holds another unfinished conversion",
            file=str(staging.output),
            expected="the same source, unchanged, and the same options",
            found=found,
            hint="run the command that began it, or start over with --overwrite",
        )


def refuse_links(output: Path) -> None:
    """Refuse a directory with links: a conversion would overwrite files elsewhere through them.

    Raises:
        UsageError: it holds anything but files and folders, or folders nested deeper than any conversion nests them.
    """
    for name, entry in walk(output):
        is_plain = entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
        if not is_plain or name.count("/") > _MAX_DEPTH:
            kind = "a link" if entry.is_symlink() else "a special file or too deep a folder"
            raise UsageError(
                "The output directory holds something other than files and folders",
                file=str(output),
                expected="files and folders",
                found=f"{kind}: {shortened(name)}",
                hint="remove it, or choose another --out",
            )


def refuse_foreign(staging: Staging, plan_files: list[str]) -> None:
    """Refuse a directory with files that are not of this unfinished conversion."""
    unfinished = staging.folder.is_dir()
    _refuse_others(staging.output, set(plan_files) if unfinished else set(), unfinished=unfinished)


def _refuse_others(output: Path, expected: set[str], *, unfinished: bool) -> None:
    """Refuse a directory with files beside ``expected``, the files of a conversion, and its working folder."""
    found = {name for name, entry in walk(output) if not entry.is_dir()}
    foreign = sorted(name for name in found - expected if not name.startswith(f"{STAGING_NAME}/"))
    if foreign:
        is_ours = (output / MANIFEST_NAME).is_file()
        raise UsageError(
            "The output directory is not empty",
            file=str(output),
            expected="an empty or new directory",
            found=f"{foreign[0]}" + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""),
            hint="replace the earlier conversion with --overwrite"
            if is_ours and not unfinished and not expected
            else "move the other files away, or choose another --out",
        )


def _start_anew(staging: Staging, needed: int) -> None:
    """Delete an earlier conversion, finished or not, and nothing else."""
    try:
        # A conversion that stopped while it moved its files up still has its manifest in the working folder.
        manifest = read_manifest(staging.output) or read_manifest(staging.files)
    except SourceError as error:
        raise UsageError(
            "The manifest of the output directory cannot be read",
            file=str(staging.output),
            found=error.message,
            hint="delete the directory, or choose another --out",
        ) from error
    names = list(manifest.file_names()) if manifest is not None else []
    _refuse_others(staging.output, set(names), unfinished=False)
    written = [*(staging.output / name for name in names), *staging.folder.rglob("*")]
    require_space(staging.output, needed, allocated(written))
    # config.json goes first, so that no engine takes the rest for a model if this is interrupted; the manifest goes
    # last, so that the deletion can be repeated.
    for name in sorted(names, key=lambda name: (name != CONFIG_NAME, name == MANIFEST_NAME)):
        (staging.output / name).unlink(missing_ok=True)
        _remove_empty_folders(staging.output, name)
        if name == CONFIG_NAME:
            sync_directory(staging.output)
    for path in list(staging.folder.iterdir()):
        if path.name != LOCK_NAME:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_empty_folders(output: Path, name: str) -> None:
    """Remove the folders of a deleted file that hold nothing else."""
    for folder in list(Path(name).parents)[:-1]:
        if (output / folder).is_dir() and not any((output / folder).iterdir()):
            (output / folder).rmdir()


def _lock(staging: Staging) -> tuple[int, bool]:
    """Lock the working folder; returns the descriptor that holds the lock, and whether the folder is new.

    The lock ends with its process, however that ends.
    """
    path = staging.folder / LOCK_NAME
    while True:
        try:
            staging.folder.mkdir()
            created = True
        except FileExistsError:
            created = False
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        except FileNotFoundError:  # another process has just finished here and removed the folder
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if path.exists() and os.path.samestat(os.fstat(descriptor), os.stat(path)):
                os.ftruncate(descriptor, 0)
                os.pwrite(descriptor, f"{os.getpid()} on {socket.gethostname()}\n".encode(), 0)
                return descriptor, created
        except BlockingIOError:
            owner = os.pread(descriptor, 300, 0).decode(errors="replace").strip() or "unknown"
            os.close(descriptor)
            raise OutputBusyError(
                "Another process is converting into this directory",
                file=str(staging.output),
                found=f"process {owner}",
                hint="wait until it has finished, or choose another --out",
            ) from None
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # the lock of a folder that is gone
