"""Carrying out a plan in shares: several processes, on one machine or several, with one output directory.

Each process holds ``.quarkconv/lock`` together with the others, and ``.quarkconv/share-K-of-N`` alone. The one that
finds all shards written takes ``lock`` alone, and finishes. The locks end with their processes, however those end.
"""

from __future__ import annotations

import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import UsageError, WriteError
from quarkconv.files.base import Files
from quarkconv.headers.unfinished import STAGING_NAME, STATE_NAME
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.plan import Plan
from quarkconv.plan.shares import Share
from quarkconv.progress import SILENT, Progress
from quarkconv.write.durable import writing
from quarkconv.write.executor import Run, files_of, open_source, run_checks, state_of
from quarkconv.write.staging import (
    LOCK_NAME,
    OutputBusyError,
    Staging,
    open_staging,
    refuse_foreign,
    refuse_links,
    resume_or_begin,
)

_BEGIN: Final = "begin"


def execute_share(
    plan: Plan, source: Path | Files, output: Path, share: Share, *, jobs: int, progress: Progress = SILENT
) -> Manifest | None:
    """Carry out one share of a plan, and finish the conversion if all shares are written.

    Several processes, on several machines, may work on the shares of one output directory at the same time, as long as
    its file system has locks (flock). They write the same bytes as :func:`execute`.

    Args:
        plan, source, output, jobs, progress: as of :func:`execute`.
        share: the share.

    Returns:
        The manifest, if the conversion is finished; None while shares are missing.

    Raises:
        UsageError: ``output`` holds something else, or was begun with something else.
        SourceError, UnsupportedError, WriteError, InterruptedByUser: as of :func:`execute`.
    """
    with closing(open_source(source, plan)) as sources:
        state = state_of(plan, source, sources, output, shares=share.count)
        with open_share(output, state, files_of(plan), share) as staging:
            run = Run(plan, sources, staging, progress)
            with run.writing():
                if not staging.checks_hold(share):
                    run_checks(share.checks(plan.checks), sources, jobs)
                    staging.record_checks(share)
                run.write_shards(share.shards(plan.shards), jobs)
                complete = all(staging.finished(shard) for shard in plan.shards)
    if not complete:
        return None
    try:
        return finish_shares(plan, source, output, jobs=jobs)
    except OutputBusyError:  # another process finishes, or will: it still holds the lock of its share
        return None


def finish_shares(
    plan: Plan, source: Path | Files, output: Path, *, jobs: int, progress: Progress = SILENT
) -> Manifest:
    """Finish a conversion whose shares are written: copy other files, and write index, manifest and config.json.

    Args and errors as of :func:`execute`.

    Raises:
        UsageError: nothing was begun in ``output``.
        WriteError: shards are missing.
    """
    if not (output / STAGING_NAME).is_dir():
        raise UsageError("There is no conversion to finish", file=str(output), expected="parts of a conversion")
    with closing(open_source(source, plan)) as sources:
        state = state_of(plan, source, sources, output)
        with open_staging(output, state, files_of(plan), needed=0, overwrite=False) as staging:
            shares = [Share(number, staging.shares()) for number in range(1, staging.shares() + 1)]
            missing = [
                share for share in shares if not all(staging.finished(shard) for shard in share.shards(plan.shards))
            ]
            if missing:
                raise WriteError(
                    "Parts of the conversion are missing",
                    file=str(output),
                    expected=f"{len(shares)} parts",
                    found=f"{len(shares) - len(missing)} finished",
                    hint="run " + ", ".join(f"--part {share}" for share in missing[:5]) + " again",
                )
            run = Run(plan, sources, staging, progress)
            with run.writing():
                unchecked = (share.checks(plan.checks) for share in shares if not staging.checks_hold(share))
                run_checks(tuple(check for checks in unchecked for check in checks), sources, jobs)
                run.write_shards(plan.shards, jobs)
                return run.finish()


@contextmanager
def open_share(output: Path, state: dict[str, Any], plan_files: list[str], share: Share) -> Iterator[Staging]:
    """Begin or join the working folder of a conversion in shares, and hold the lock of one of them.

    Args:
        output: the output directory of all shares; created if necessary.
        state: what identifies the conversion, of :func:`plan_state`.
        plan_files: the files that the plan will write.
        share: the share.

    Raises:
        UsageError: the directory holds something else, or a conversion that was begun with something else.
        OutputBusyError: another process works on this share, or on the whole.
        WriteError: the directory cannot be created.
    """
    staging = Staging(output, state["plan"])
    with ExitStack() as locks:
        with writing(output):
            if output.exists() and not output.is_dir():
                raise UsageError("The output is a file", file=str(output), expected="a directory")
            output.mkdir(parents=True, exist_ok=True)
            if not staging.folder.is_dir():  # a finished output must not get a working folder
                refuse_foreign(staging, plan_files)
            staging.folder.mkdir(exist_ok=True)
            for name, mode in ((LOCK_NAME, fcntl.LOCK_SH), (f"share-{share.number}-of-{share.count}", fcntl.LOCK_EX)):
                _hold(locks, staging.folder / name, mode)
            with _waiting(staging.folder / _BEGIN):  # one process writes the state, the others compare theirs with it
                try:
                    refuse_links(output)
                    refuse_foreign(staging, plan_files)
                    resume_or_begin(staging, state)
                except BaseException:
                    if not (staging.folder / STATE_NAME).exists():  # nothing was begun, so nothing is unfinished
                        shutil.rmtree(staging.folder, ignore_errors=True)
                    raise
        yield staging


def _open(path: Path) -> int:
    return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)


def _hold(locks: ExitStack, path: Path, mode: int) -> None:
    descriptor = _open(path)
    locks.callback(os.close, descriptor)
    try:
        fcntl.flock(descriptor, mode | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OutputBusyError(
            "Another process is working on this part, or on the whole",
            file=str(path.parent.parent),
            hint="wait until it has finished",
        ) from None


@contextmanager
def _waiting(path: Path) -> Iterator[None]:
    """Hold a lock that others hold for a moment only."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)
