"""Carrying out a plan in shares: several processes, on one machine or several, with one output.

In a directory, each process holds ``.quarkconv/lock`` together with the others, and ``.quarkconv/share-K-of-N`` alone.
The one that finds all shards written takes ``lock`` alone, and finishes. The locks end with their processes, however
those end.
"""

from __future__ import annotations

import fcntl
import shutil
import uuid
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from itertools import chain
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import UsageError, WriteError
from quarkconv.files.base import Files
from quarkconv.headers.unfinished import STATE_NAME
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.plan import Plan
from quarkconv.plan.shares import Share, ShareWork
from quarkconv.progress import SILENT, Progress
from quarkconv.write.checks import run_checks
from quarkconv.write.destination import Destination
from quarkconv.write.durable import writing
from quarkconv.write.executor import Run
from quarkconv.write.locks import LOCK_NAME, OutputBusyError, hold, waiting_for
from quarkconv.write.opening import files_of, opened
from quarkconv.write.output import has_begun, open_output
from quarkconv.write.output_directory import create_directory, refuse_foreign, refuse_links, resume_or_begin
from quarkconv.write.staging import Staging

_BEGIN: Final = "begin"


def execute_share(
    plan: Plan,
    source: Path | Files,
    output: Path | str,
    work: ShareWork,
    *,
    digest: str,
    jobs: int,
    progress: Progress = SILENT,
) -> Manifest | None:
    """Carry out one share of a plan, and finish the conversion if all shares are written.

    Several processes, on several machines, may work on the shares of one output at the same time; the file system of a
    directory must have locks (flock). They write the same bytes as :func:`execute`.

    Args:
        plan, source, output, digest, jobs, progress: as of :func:`execute`.
        work: the shards and checks of the share.

    Returns:
        The manifest, if the conversion is finished; None while shares are missing.

    Raises:
        UsageError: ``output`` holds something else, or was begun with something else.
        SourceError, UnsupportedError, WriteError, InterruptedByUser: as of :func:`execute`.
    """
    share = work.share
    with (
        opened(plan, digest, source, output, shares=share.count) as (sources, state),
        _open_share(output, state, files_of(plan), share) as destination,
    ):
        run = Run(plan, sources, destination, progress)
        with run.writing():
            if not destination.checks_hold(share):
                run_checks(work.checks, sources, jobs)
                destination.record_checks(share)
            run.write_shards(work.shards, jobs)
            destination.refresh()
            complete = all(destination.finished(shard) for shard in plan.shards)
    if not complete:
        return None
    try:
        return finish_shares(plan, source, output, digest=digest, jobs=jobs)
    except OutputBusyError:  # another process finishes, or will: it still holds the lock of its share
        return None


def finish_shares(
    plan: Plan, source: Path | Files, output: Path | str, *, digest: str, jobs: int, progress: Progress = SILENT
) -> Manifest:
    """Finish a conversion whose shares are written: copy other files, and write index, manifest and config.json.

    Args and errors as of :func:`execute`.

    Raises:
        UsageError: nothing was begun in ``output``.
        WriteError: shards are missing.
    """
    if not has_begun(output):
        raise UsageError(
            "The output directory has no unfinished conversion", file=str(output), expected="parts of a conversion"
        )
    with (
        opened(plan, digest, source, output) as (sources, state),
        open_output(output, state, files_of(plan), needed=0, overwrite=False) as destination,
    ):
        count = destination.shares()
        works = [Share(number, max(count, 1)).work(plan) for number in range(1, max(count, 1) + 1)]
        missing = [work.share for work in works if not all(map(destination.finished, work.shards))]
        if missing:
            raise WriteError(
                "Parts of the conversion are missing",
                file=str(output),
                expected=f"{len(works)} parts",
                found=f"{len(works) - len(missing)} finished",
                hint="run " + (", ".join(f"--part {share}" for share in missing[:5]) if count else "--join") + " again",
            )
        run = Run(plan, sources, destination, progress)
        with run.writing():
            unchecked = (work.checks for work in works if not destination.checks_hold(work.share))
            run_checks(tuple(chain.from_iterable(unchecked)), sources, jobs)
            run.write_shards(plan.shards, jobs)
            return run.finish()


def _open_share(
    output: Path | str, state: dict[str, Any], plan_files: list[str], share: Share
) -> AbstractContextManager[Destination]:
    if isinstance(output, Path):
        return open_share(output, state, plan_files, share)
    from quarkconv.write.object_destination import open_objects

    return open_objects(output, state, plan_files)


@contextmanager
def open_share(output: Path, state: dict[str, Any], plan_files: list[str], share: Share | None) -> Iterator[Staging]:
    """Begin or join the working folder of a conversion in shares, and hold the lock of one of them.

    Args:
        output: the output directory of all shares; created if necessary.
        state: what identifies the conversion, of :func:`plan_state`.
        plan_files: the files that the plan will write.
        share: the share; None where workers take shards by leases.

    Raises:
        UsageError: the directory holds something else, or a conversion that was begun with something else.
        OutputBusyError: another process works on this share, or on the whole.
        WriteError: the directory cannot be created.
    """
    staging = Staging(output, state["plan"], worker="" if share is not None else f".{uuid.uuid4().hex}")
    names = {LOCK_NAME: fcntl.LOCK_SH}
    if share is not None:
        names[f"share-{share.number}-of-{share.count}"] = fcntl.LOCK_EX
    with ExitStack() as locks:
        with writing(output):
            create_directory(output)
            if not staging.folder.is_dir():  # a finished output must not get a working folder
                refuse_foreign(staging, plan_files)
            staging.folder.mkdir(exist_ok=True)
            for name, mode in names.items():
                hold(locks, staging.folder / name, mode)
            with waiting_for(
                staging.folder / _BEGIN
            ):  # one process writes the state, the others compare theirs with it
                try:
                    refuse_links(output)
                    refuse_foreign(staging, plan_files)
                    resume_or_begin(staging, state)
                except BaseException:
                    if not (staging.folder / STATE_NAME).exists():  # nothing was begun, so nothing is unfinished
                        shutil.rmtree(staging.folder, ignore_errors=True)
                    raise
        yield staging
