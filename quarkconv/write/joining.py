"""Carrying out a plan with workers that come and go: each takes shards by leases until all are written."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from quarkconv.errors import QuarkconvError, UsageError
from quarkconv.files.base import Files
from quarkconv.headers.unfinished import STAGING_NAME
from quarkconv.plan.manifest import Manifest, WrittenShard
from quarkconv.plan.pieces import OutputShard
from quarkconv.plan.plan import Plan
from quarkconv.plan.shares import Share
from quarkconv.progress import SILENT, Progress
from quarkconv.write.checks import check_float_rows, run_checks
from quarkconv.write.destination import Destination
from quarkconv.write.executor import Run
from quarkconv.write.leases import DirectoryLeases, Leases, ObjectLeases
from quarkconv.write.locks import OutputBusyError
from quarkconv.write.opening import files_of, opened
from quarkconv.write.output import finished_output
from quarkconv.write.shares import finish_shares, open_share
from quarkconv.write.state import JOINED

POLL_SECONDS: Final = 1.0
"""Seconds between two looks at what others do."""
_CHECKS: Final = "checks"
_FINISH: Final = "finish"
_ALL: Final = Share(1, 1)

_log: Final = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Joined:
    """What one worker did.

    Attributes:
        manifest: the manifest, if this worker saw the conversion finished.
        shards: number of shards that it wrote; those of all workers add up to the number of shards.
        nbytes: their bytes.
    """

    manifest: Manifest | None
    shards: int
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """What ``convert --join --json`` prints of it."""
        return {"joined": {"shards": self.shards, "bytes": self.nbytes}}


class _LeaseLostError(Exception):
    """Another worker took a lease over while this one wrote."""


def execute_joined(
    plan: Plan, source: Path | Files, output: Path | str, *, digest: str, jobs: int, progress: Progress = SILENT
) -> Joined:
    """Work on a plan together with others until it is carried out, and finish it.

    Any number of workers, on any machines, may begin and end at any time. A shard whose worker died is written by
    another one. They write the same bytes as :func:`quarkconv.write.executor.execute`.

    Args and errors as of :func:`quarkconv.write.executor.execute`.

    Raises:
        WriteError: the object store has no conditional writes.
    """
    written: list[WrittenShard] = []

    def joined(manifest: Manifest | None) -> Joined:
        return Joined(manifest, len(written), sum(shard.size for shard in written))

    while True:
        try:
            with (
                opened(plan, digest, source, output, shares=JOINED) as (sources, state),
                _open(output, state, files_of(plan)) as (destination, leases),
                leases.renewing(),
            ):
                run = Run(plan, sources, destination, progress)
                run.recorded = written
                worker = _Worker(run, leases, jobs)
                with run.writing():
                    worker.work()
                    if not isinstance(output, Path):
                        return joined(worker.finish(output, digest))
        except _LeaseLostError:
            continue
        except UsageError:  # another worker may have finished the conversion meanwhile
            manifest = finished_output(output, digest)
            if manifest is None:
                raise
            return joined(manifest)
        try:
            return joined(finish_shares(plan, source, output, digest=digest, jobs=jobs))
        except OutputBusyError:  # another worker finishes, or will: it still works there
            return joined(None)
        except UsageError:  # it has finished
            return joined(finished_output(output, digest))


@contextmanager
def open_joined(output: Path | str, state: dict[str, Any], plan_files: list[str]) -> Iterator[Destination]:
    """Begin or join a conversion whose shards several workers may write; who writes which is the caller's matter.

    Args and errors as of :func:`quarkconv.write.output.open_output`.
    """
    if isinstance(output, Path):
        with open_share(output, state, plan_files, None) as staging:
            yield staging
        return
    from quarkconv.write.object_destination import open_objects

    with open_objects(output, state, plan_files) as destination:
        yield destination


@contextmanager
def _open(output: Path | str, state: dict[str, Any], plan_files: list[str]) -> Iterator[tuple[Destination, Leases]]:
    """Begin or join a conversion; the destination, and the leases of this worker."""
    if isinstance(output, Path):
        with open_share(output, state, plan_files, None) as staging:
            yield staging, Leases(DirectoryLeases(staging.folder))
        return
    from quarkconv.write.object_destination import open_objects

    with open_objects(output, state, plan_files) as destination:
        destination.objects.require_conditions(f"{STAGING_NAME}/conditions")
        yield destination, Leases(ObjectLeases(destination.objects))


class _Worker:
    """One worker's way through a plan."""

    def __init__(self, run: Run, leases: Leases, jobs: int) -> None:
        self._run = run
        self._destination = run.destination
        self._leases = leases
        self._jobs = jobs
        self._counted: set[str] = set()

    def work(self) -> None:
        """Take shards until all are written and the checks hold.

        Raises:
            _LeaseLostError: writing failed, and another worker has taken the shard over.
        """
        while True:
            self._destination.refresh()
            checked = self._destination.checks_hold(_ALL)
            if not checked and self._leases.take(_CHECKS):
                self._check()
                continue
            todo = self._unfinished()
            if not todo and checked:
                return
            batch = self._take(todo)
            if batch:
                self._write(batch)
            else:
                time.sleep(POLL_SECONDS)

    def finish(self, url: str, digest: str) -> Manifest:
        """Finish a conversion in an object store, or wait until another worker has."""
        while True:
            if self._leases.take(_FINISH):
                self._destination.refresh()
                self._run.write_shards(self._run.plan.shards, self._jobs)
                return self._run.finish()
            time.sleep(POLL_SECONDS)
            manifest = finished_output(url, digest)
            if manifest is not None:
                return manifest

    def _check(self) -> None:
        plan = self._run.plan
        run_checks(plan.checks, self._run.sources, self._jobs)
        check_float_rows(plan, self._run.sources, self._jobs)
        self._destination.record_checks(_ALL)
        self._leases.release(_CHECKS)

    def _unfinished(self) -> list[OutputShard]:
        """The shards that are not written; those that others wrote are counted."""
        todo = []
        for shard in self._run.plan.shards:
            if self._destination.finished(shard) is None:
                todo.append(shard)
            elif shard.file not in self._counted:
                self._counted.add(shard.file)
                self._run.count(shard.nbytes)
        return todo

    def _take(self, todo: list[OutputShard]) -> tuple[OutputShard, ...]:
        """Leases of shards that nobody works on: in a store as many as there are threads, each of which streams one."""
        count = 1 if isinstance(self._destination.location, Path) else self._jobs
        taken: list[OutputShard] = []
        for shard in todo:
            if len(taken) < count and self._leases.take(shard.file):
                taken.append(shard)
        if taken:  # another worker may have finished one, and given its lease back, since the last look
            self._destination.refresh()
        for shard in taken:
            if self._destination.finished(shard) is not None:
                self._leases.release(shard.file)
        return tuple(shard for shard in taken if self._destination.finished(shard) is None)

    def _write(self, batch: tuple[OutputShard, ...]) -> None:
        try:
            self._run.write_shards(batch, self._jobs)
        except QuarkconvError as error:
            if all(self._leases.holds(shard.file) for shard in batch):
                raise
            _log.info("another worker took over what failed here: %s", error.message)
            raise _LeaseLostError from error
        for shard in batch:
            self._counted.add(shard.file)
            self._leases.release(shard.file)
