"""Carrying out a plan with workers that come and go: each takes shards by leases until all are written."""

from __future__ import annotations

import logging
import time
from typing import Final

from quarkconv.errors import QuarkconvError, UsageError
from quarkconv.plan.manifest import Manifest, WrittenShard
from quarkconv.plan.pieces import OutputShard
from quarkconv.plan.shares import ALL
from quarkconv.write.checks import check_float_rows, run_checks
from quarkconv.write.execution import Execution
from quarkconv.write.executor import Run
from quarkconv.write.leases import Leases
from quarkconv.write.locks import OutputBusyError
from quarkconv.write.modes import Contribution
from quarkconv.write.shares import finish_shares

POLL_SECONDS: Final = 1.0
"""Seconds between two looks at what others do."""
_CHECKS: Final = "checks"
_FINISH: Final = "finish"

_log: Final = logging.getLogger(__name__)


class _LeaseLostError(Exception):
    """Another worker took a lease over while this one wrote."""


def write_joined(execution: Execution) -> Contribution:
    """Work on a plan together with others until it is carried out, and finish it.

    Any number of workers, on any machines, may begin and end at any time. A shard whose worker died is written by
    another one.

    Errors as of :func:`quarkconv.write.write.write_output`.

    Raises:
        WriteError: the object store has no conditional writes.
    """
    written: list[WrittenShard] = []

    def contribution(manifest: Manifest | None) -> Contribution:
        return Contribution(manifest, len(written), sum(shard.size for shard in written))

    while True:
        try:
            manifest = _work(execution, written)
        except _LeaseLostError:
            continue
        except UsageError:  # another worker may have finished the conversion meanwhile
            manifest = execution.finished()
            if manifest is None:
                raise
        if manifest is not None:
            return contribution(manifest)
        try:
            return contribution(finish_shares(execution.silent()))
        except OutputBusyError:  # another worker finishes, or will: it still works there
            return contribution(None)
        except UsageError:  # it has finished
            return contribution(execution.finished())


def _work(execution: Execution, written: list[WrittenShard]) -> Manifest | None:
    """Work until all shards are written; the manifest where no lock keeps this worker from finishing at once.

    Args:
        execution: the plan, its source and its output.
        written: receives the shards that this worker wrote.
    """
    with execution.opened() as sources, execution.joined(sources) as run:
        run.recorded = written
        leases = Leases(run.destination.leases())
        with leases.renewing(), run.writing():
            worker = _Worker(execution, run, leases)
            worker.work()
            return None if run.destination.has_locks else worker.finish()


class _Worker:
    """One worker's way through a plan."""

    def __init__(self, execution: Execution, run: Run, leases: Leases) -> None:
        self._execution = execution
        self._run = run
        self._destination = run.destination
        self._leases = leases
        self._jobs = execution.jobs
        self._counted: set[str] = set()

    def work(self) -> None:
        """Take shards until all are written and the checks hold.

        Raises:
            _LeaseLostError: writing failed, and another worker has taken the shard over.
        """
        while True:
            self._destination.refresh()
            checked = self._destination.checks_hold(ALL)
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

    def finish(self) -> Manifest:
        """Finish a conversion in an object store, or wait until another worker has."""
        while True:
            if self._leases.take(_FINISH):
                self._destination.refresh()
                self._run.write_shards(self._run.plan.shards, self._jobs)
                return self._run.finish()
            time.sleep(POLL_SECONDS)
            manifest = self._execution.finished()
            if manifest is not None:
                return manifest

    def _check(self) -> None:
        plan = self._run.plan
        run_checks(plan.checks, self._run.sources, self._jobs)
        check_float_rows([plan], self._run.sources, self._jobs)
        self._destination.record_checks(ALL)
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
        """Leases of shards that nobody works on: as many as there are threads, where each of these streams one."""
        count = self._jobs if self._destination.streams else 1
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
