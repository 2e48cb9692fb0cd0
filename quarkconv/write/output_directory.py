"""The output directory before anything is written to it: created, or one of an earlier run of this conversion."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import SourceError, UsageError
from quarkconv.files.regular import walk
from quarkconv.headers.file_names import CONFIG_NAME, MANIFEST_NAME
from quarkconv.headers.unfinished import STAGING_NAME, STATE_NAME, read_state
from quarkconv.plan.manifest import Manifest, read_manifest
from quarkconv.plan.pieces import OutputShard
from quarkconv.plan.shares import Share
from quarkconv.text import shortened
from quarkconv.write.durable import sync_directory, write_durably, writing
from quarkconv.write.locks import (
    LOCK_NAME,
    OutputBusyError,
    OutputFinishingError,
    hold,
    lock_folder,
    unlock_folder,
    waiting_for,
)
from quarkconv.write.space import allocated, require_space
from quarkconv.write.staging import Staging
from quarkconv.write.state import difference, refuse_difference

_MAX_DEPTH: Final = 100
_BEGIN: Final = "begin"
"""A lock that a process holds while it reads the output's state, and writes it if it is the first."""


@dataclass(frozen=True, slots=True)
class OutputDirectory:
    """A directory as an output; errors of all methods as of :class:`quarkconv.write.destination.Output`.

    Attributes:
        location: the directory; created when a conversion begins.
    """

    location: Path

    def finished(self, digest: str) -> Manifest | None:
        """The manifest that an earlier run of the same plan wrote; None without one, and where none has finished.

        An output without config.json is one that is being deleted. Of a run that was killed as it ended, the rest of
        the working folder is removed.
        """
        folder = self.location / STAGING_NAME
        if (folder / STATE_NAME).exists() or not (self.location / CONFIG_NAME).is_file():
            return None
        manifest = read_manifest(self.location)
        if manifest is None or manifest.plan != digest:
            return None
        if folder.is_dir():
            _remove_rest(folder)
        return manifest

    def has_begun(self) -> bool:
        """Whether there is a working folder."""
        return os.path.isdir(self.location / STAGING_NAME)  # False too where the path is too long

    @contextmanager
    def begin(self, state: dict[str, Any], plan_files: list[str], *, needed: int, overwrite: bool) -> Iterator[Staging]:
        """Create or resume the working folder, and hold its lock alone."""
        output = self.location
        staging = Staging(output, state["plan"])
        with writing(output):
            create_directory(output)
            _refuse_links(output)
            if not overwrite:
                _refuse_foreign(staging, plan_files)
            descriptor, created = lock_folder(staging.folder)
        try:
            try:
                with writing(output):
                    if overwrite:
                        _start_anew(staging, needed)
                    else:
                        _refuse_foreign(staging, plan_files)
                    _resume_or_begin(staging, state)
            except BaseException:
                if created or not (staging.folder / STATE_NAME).exists():  # nothing has begun, so nothing is unfinished
                    shutil.rmtree(staging.folder, ignore_errors=True)
                raise
            for folder in (staging.folder, output, output.absolute().parent):
                with suppress(OSError):  # a folder of another owner, who makes its names durable
                    sync_directory(folder)
            yield staging
        finally:
            unlock_folder(staging.folder, descriptor)

    @contextmanager
    def join(self, state: dict[str, Any], plan_files: list[str], share: Share | None) -> Iterator[Staging]:
        """Create or resume the working folder, and hold its lock together with others, and that of the share alone."""
        output = self.location
        staging = Staging(output, state["plan"], worker="" if share is not None else f".{uuid.uuid4().hex}")
        names = {LOCK_NAME: fcntl.LOCK_SH}
        if share is not None:
            names[f"share-{share.number}-of-{share.count}"] = fcntl.LOCK_EX
        with ExitStack() as locks:
            with writing(output):
                create_directory(output)
                try:
                    _hold(locks, staging, plan_files, names)
                except OutputBusyError as error:
                    if share is None and difference(read_state(staging.folder / STATE_NAME), state) is None:
                        raise OutputFinishingError(error.message, file=error.file, hint=error.hint) from error
                    raise
                # One process writes the state, the others compare theirs with it.
                with waiting_for(staging.folder / _BEGIN):
                    try:
                        _refuse_links(output)
                        _refuse_foreign(staging, plan_files)
                        _resume_or_begin(staging, state)
                    except BaseException:
                        if not (staging.folder / STATE_NAME).exists():  # nothing was begun, so nothing is unfinished
                            shutil.rmtree(staging.folder, ignore_errors=True)
                        raise
            yield staging

    def rejoin(
        self,
        state: dict[str, Any],
        plan_files: list[str],
        shard: OutputShard,  # noqa: ARG002 - looking at a directory costs little
    ) -> AbstractContextManager[Staging]:
        """Go on with a conversion, as :meth:`join`."""
        return self.join(state, plan_files, None)


def _remove_rest(folder: Path) -> None:
    """Remove the working folder of a finished conversion, unless another process works there."""
    with suppress(OutputBusyError, OSError):
        descriptor, _ = lock_folder(folder)
        try:
            if not (folder / STATE_NAME).exists():
                shutil.rmtree(folder, ignore_errors=True)
        finally:
            unlock_folder(folder, descriptor)


def _hold(locks: ExitStack, staging: Staging, plan_files: list[str], names: dict[str, int]) -> None:
    """Hold locks of the working folder until ``locks`` is closed; a folder that is removed meanwhile is created anew.

    Args:
        locks: closes them.
        staging: the working folder.
        plan_files: the files that the plan will write.
        names: the names of the locks, with their modes of flock.
    """
    while True:
        if not staging.folder.is_dir():  # a finished output must not get a working folder
            _refuse_foreign(staging, plan_files)
        staging.folder.mkdir(exist_ok=True)
        with suppress(FileNotFoundError), ExitStack() as held:
            for name, mode in names.items():
                hold(held, staging.folder / name, mode)
            locks.push(held.pop_all())
            return


def _resume_or_begin(staging: Staging, state: dict[str, Any]) -> None:
    """Note the identity of the conversion, or refuse to resume another one."""
    path = staging.folder / STATE_NAME
    if not path.is_file():
        staging.forget()
        write_durably(path, json.dumps(state).encode())
        return
    refuse_difference(str(staging.output), read_state(path), state)


def create_directory(output: Path) -> None:
    """Create the output directory, if it does not exist.

    Raises:
        UsageError: it is a file.
    """
    if output.exists() and not output.is_dir():
        raise UsageError(
            "The output is a file",
            file=str(output),
            expected="a new or empty directory",
            hint="choose another --out",
        )
    output.mkdir(parents=True, exist_ok=True)


def _refuse_links(output: Path) -> None:
    """Refuse a directory with links: a conversion would overwrite files elsewhere through them.

    Raises:
        UsageError: it holds anything but files and folders, or folders nested deeper than any conversion nests them.
    """
    for name, entry in walk(output):
        is_plain = entry.is_dir(follow_symlinks=False) or entry.is_file(follow_symlinks=False)
        if not is_plain or name.count("/") > _MAX_DEPTH:
            kind = "a link" if entry.is_symlink() else "a special file, or folders nested too deep"
            raise UsageError(
                "The output directory holds something other than files and folders",
                file=str(output),
                expected="files and folders",
                found=f"{kind}: {shortened(name)}",
                hint="remove it, or choose another --out",
            )


def _refuse_foreign(staging: Staging, plan_files: list[str]) -> None:
    """Refuse a directory with files that are not of this unfinished conversion.

    A working folder without its state beside a manifest is left of a process that has just finished there: the state is
    written before anything else, and removed after the manifest and config.json have their names.
    """
    finished = not (staging.folder / STATE_NAME).exists() and (staging.output / MANIFEST_NAME).is_file()
    unfinished = staging.folder.is_dir() and not finished
    _refuse_others(staging.output, set(plan_files) if unfinished else set())


def _refuse_others(output: Path, expected: set[str]) -> None:
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
            if is_ours and not expected
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
    _refuse_others(staging.output, set(names))
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
