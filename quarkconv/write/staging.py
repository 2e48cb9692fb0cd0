"""The output directory while a conversion is under way.

Everything is prepared in ``OUT/.quarkconv`` and moved up when all of it is complete, config.json last: until then the
directory has no config.json and no engine takes it for a model. The folder holds

    plan.json          the plan that is being carried out, and the state of the source's files: a later run resumes
                       only if it would make the same of the same
    lock               held while a process works here
    notes/NAME.json    the checksums of the pieces of a finished shard
    files/NAME         a file that is finished and on disk
    parts/NAME         a file that is being written

A finished shard is never written again; whatever else is found after a crash is made anew.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Final

from quarkconv.errors import SourceError, UsageError, WriteError
from quarkconv.headers.checkpoint import CONFIG_NAME, MANIFEST_NAME, STAGING_NAME
from quarkconv.manifest import WrittenPiece, WrittenShard, WrittenTensor, read_manifest
from quarkconv.plan.pieces import OutputShard

_PLAN: Final = "plan.json"
_LOCK: Final = "lock"


class Staging:
    """The working folder of one conversion. Use :func:`open_staging` to get one."""

    def __init__(self, output: Path, plan_digest: str) -> None:
        self.output = output
        self.plan_digest = plan_digest
        self.folder = output / STAGING_NAME
        self.files = self.folder / "files"
        self.parts = self.folder / "parts"
        self.notes = self.folder / "notes"

    def part(self, name: str) -> Path:
        """Where a file is written before it is finished; its folder exists."""
        path = self.parts / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self, name: str) -> None:
        """Give a file that is complete and on disk its name."""
        path = self.files / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.replace(self.part(name), path)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file of the output, durably, under its name or not at all."""
        _write_and_sync(self.part(name), data)
        self.finish(name)

    def record(self, shard: WrittenShard) -> None:
        """Note the checksums of a shard that is complete and on disk, then give it its name."""
        checksums = [[written.checksum for written in tensor.pieces] for tensor in shard.tensors]
        note = {"plan": self.plan_digest, "header": shard.header_checksum, "pieces": checksums}
        write_durably(self.notes / f"{shard.file}.json", json.dumps(note).encode())
        self.finish(shard.file)

    def finished(self, shard: OutputShard) -> WrittenShard | None:
        """What an earlier run recorded of a shard; None when it has to be written."""
        path = next((path for path in (self.files / shard.file, self.output / shard.file) if path.is_file()), None)
        note_path = self.notes / f"{shard.file}.json"
        if path is None or not note_path.is_file() or path.stat().st_size != shard.nbytes:
            return None
        try:
            note = json.loads(note_path.read_bytes())
            if note["plan"] != self.plan_digest:
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

    def publish(self, names: list[str]) -> None:
        """Move the finished files to where they belong, config.json last, and remove the working folder."""
        for name in sorted(names, key=lambda name: name == CONFIG_NAME):
            staged, final = self.files / name, self.output / name
            final.parent.mkdir(parents=True, exist_ok=True)
            if staged.exists():
                if name == CONFIG_NAME:
                    sync_directory(self.output)
                os.replace(staged, final)
        sync_directory(self.output)
        shutil.rmtree(self.folder)


@contextmanager
def open_staging(
    output: Path, plan_digest: str, source_state: list[list[int]], plan_files: list[str], *, overwrite: bool
) -> Iterator[Staging]:
    """Make or resume the working folder of a conversion, and hold its lock.

    Args:
        output: the output directory; made if it does not exist.
        plan_digest: identity of the plan.
        source_state: size and time of modification of the source's files, in order.
        plan_files: the files that the plan will write.
        overwrite: whether an earlier output of quarkconv is deleted, and an unfinished one started anew.

    Raises:
        UsageError: the directory holds something that must not be overwritten, or another plan's unfinished work.
        WriteError: another process works there, or the directory cannot be made.
    """
    staging = Staging(output, plan_digest)
    if output.exists() and not output.is_dir():
        raise UsageError(
            "The output is a file", file=str(output), expected="a new or empty directory", hint="give another --out"
        )
    try:
        output.mkdir(parents=True, exist_ok=True)
        if not overwrite:
            _refuse_foreign(output, set(plan_files) if staging.folder.is_dir() else set())
        made = not staging.folder.is_dir()
        staging.folder.mkdir(exist_ok=True)
        descriptor = os.open(staging.folder / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise as_write_error(error, output) from error
    try:
        _lock(descriptor, output)
        try:
            if overwrite:
                _start_anew(staging)
            _resume_or_begin(staging, {"plan": plan_digest, "sources": source_state})
        except OSError as error:
            raise as_write_error(error, output) from error
        yield staging
    except UsageError:
        if made:
            shutil.rmtree(staging.folder, ignore_errors=True)
        raise
    finally:
        os.close(descriptor)


def _resume_or_begin(staging: Staging, state: dict[str, object]) -> None:
    """Note what is being done, or refuse to go on with what was begun with something else."""
    plan_file = staging.folder / _PLAN
    if not plan_file.is_file():
        write_durably(plan_file, json.dumps(state).encode())
        return
    try:
        begun = json.loads(plan_file.read_bytes())
    except ValueError:
        begun = None
    if begun == state:
        return
    same_plan = isinstance(begun, dict) and begun.get("plan") == state["plan"]
    found = "the source's files have changed since" if same_plan else "another source, target or shard size"
    raise UsageError(
        "The output directory holds a conversion that was begun with something else", file=str(staging.output),
        expected="the same source, unchanged, and the same options", found=found,
        hint="give the options it was begun with, or --overwrite to start anew",
    )  # fmt: skip


def write_durably(path: Path, data: bytes) -> None:
    """Write a small file so that it is on disk under its name, or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    _write_and_sync(part, data)
    os.replace(part, path)


def _write_and_sync(path: Path, data: bytes) -> None:
    with open(path, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def as_write_error(error: OSError, path: Path) -> WriteError:
    """The error for a failure to write below ``path``."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return WriteError(
            "There is no space left", file=str(path), found=error.strerror,
            hint="make space and give the same command again: it resumes where it stopped",
        )  # fmt: skip
    return WriteError(
        "Writing failed", file=str(error.filename or path), found=error.strerror or str(error),
        hint="give the same command again when the cause is gone: it resumes where it stopped",
    )  # fmt: skip


def _refuse_foreign(output: Path, expected: set[str]) -> None:
    """Refuse a directory that holds anything but ``expected``, the files of a conversion, and its working folder."""
    found = {path.relative_to(output).as_posix() for path in output.rglob("*") if not path.is_dir()}
    foreign = sorted(name for name in found - expected if not name.startswith(f"{STAGING_NAME}/"))
    if foreign:
        is_ours = (output / MANIFEST_NAME).is_file()
        raise UsageError(
            "The output directory is not empty", file=str(output), expected="an empty or new directory",
            found=f"{foreign[0]}" + (f" and {len(foreign) - 1} more" if len(foreign) > 1 else ""),
            hint="give --overwrite to replace the earlier conversion" if is_ours and not expected
            else "move what is not of the conversion away, or give another --out",
        )  # fmt: skip


def _start_anew(staging: Staging) -> None:
    """Delete an earlier conversion, finished or not, and nothing else."""
    try:
        # A conversion that was stopped while it moved its files up still has its manifest in the working folder.
        manifest = read_manifest(staging.output) or read_manifest(staging.files)
    except SourceError as error:
        raise UsageError(
            "The output directory has a manifest that cannot be read", file=str(staging.output), found=error.message,
            hint="delete the directory, or give another --out",
        ) from error  # fmt: skip
    _refuse_foreign(staging.output, set(manifest.file_names()) if manifest is not None else set())
    if manifest is not None:
        # config.json goes first, so that what is left of a model whose deletion is interrupted is not taken for one;
        # the manifest goes last, so that the deletion can be repeated.
        names = sorted(manifest.file_names(), key=lambda name: (name != CONFIG_NAME, name == MANIFEST_NAME))
        for name in names:
            (staging.output / name).unlink(missing_ok=True)
            _remove_empty_folders(staging.output, name)
    for path in list(staging.folder.iterdir()):
        if path.name != _LOCK:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _remove_empty_folders(output: Path, name: str) -> None:
    """Remove the folders of a deleted file that hold nothing else."""
    for folder in list(Path(name).parents)[:-1]:
        if (output / folder).is_dir() and not any((output / folder).iterdir()):
            (output / folder).rmdir()


def _lock(descriptor: int, output: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        owner = os.pread(descriptor, 32, 0).decode(errors="replace").strip() or "unknown"
        raise WriteError(
            "Another process is converting into this directory", file=str(output), found=f"process {owner}",
            hint="wait until it has finished, or give another --out",
        ) from None  # fmt: skip
    os.ftruncate(descriptor, 0)
    os.pwrite(descriptor, f"{os.getpid()}\n".encode(), 0)
