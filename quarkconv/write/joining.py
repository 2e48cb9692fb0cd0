"""Carrying out a plan with workers that come and go: each takes shards by leases until all are written."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from itertools import islice
from math import log2
from random import Random
from typing import Final

from quarkconv.errors import QuarkconvError, UsageError
from quarkconv.plan.manifest import Manifest, WrittenShard
from quarkconv.plan.pieces import OutputShard
from quarkconv.plan.shares import ALL
from quarkconv.write.checks import check_float_rows, run_checks
from quarkconv.write.execution import Execution
from quarkconv.write.executor import Run
from quarkconv.write.leases import Leases
from quarkconv.write.locks import OutputBusyError, OutputFinishingError
from quarkconv.write.modes import Contribution
from quarkconv.write.shares import finish_shares

POLL_SECONDS: Final = 1.0
"""Seconds between two looks at what others do, while there is nothing to do."""
LOOK_SECONDS: Final = 5.0
"""Seconds between two looks while this worker writes."""
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
        except OutputFinishingError:  # nothing is left for this worker
            return contribution(execution.finished())
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
        self._writing: set[str] = set()
        self._random = Random()

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
            before = len(self._counted)
            self._write()
            if len(self._counted) == before:
                time.sleep(POLL_SECONDS)

    def finish(self) -> Manifest:
        """Finish a conversion in an object store, or wait until another worker has."""
        while True:
            if self._leases.take(_FINISH):
                self._destination.refresh()
                self._run.end_progress()
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
            if not self._destination.is_listed(shard):
                todo.append(shard)
            elif shard.file not in self._counted and shard.file not in self._writing:
                self._counted.add(shard.file)
                self._run.count(shard.nbytes)
        return todo

    def _in_order(self) -> list[OutputShard]:
        """The shards to take, in an order of this worker's own: those that others write come last.

        Large ones come first, so that all workers end at about the same time.
        """
        todo = self._unfinished()
        self._random.shuffle(todo)
        return sorted(todo, key=lambda shard: (self._destination.is_leased(shard), -int(4 * log2(shard.nbytes))))

    def _write(self) -> None:
        """Write shards that no other worker writes: one by one, or several at a time where they are streamed."""
        try:
            if self._destination.streams:
                self._run.write_leased(self._leased(), self._jobs, self._wrote)
            else:
                for shard in islice(self._leased(), 1):
                    self._run.write_shards((shard,), self._jobs)
                    self._wrote(shard)
        except (QuarkconvError, OSError) as error:
            if all(self._leases.holds(name) for name in self._writing):
                raise
            _log.info("another worker took over what failed here: %s", error)
            raise _LeaseLostError from error

    def _leased(self) -> Iterator[OutputShard]:
        """Shards whose leases this worker takes one by one, until another worker writes each of the rest."""
        todo, looked = iter(self._in_order()), time.monotonic()
        while (shard := next(todo, None)) is not None:
            if time.monotonic() - looked > LOOK_SECONDS:
                self._destination.refresh()
                todo, looked = iter(self._in_order()), time.monotonic()
            elif shard.file not in self._writing and self._leases.take(shard.file):
                # Another worker may have finished it, and given its lease back, since the last look.
                if self._destination.finished_now(shard):
                    self._leases.release(shard.file)
                    todo, looked = iter(self._in_order()), time.monotonic()
                    continue
                # In a directory, looking costs nothing; a worker that fails gives its lease back as well.
                if self._destination.has_locks or self._leases.took_over(shard.file):
                    self._destination.discard_partial((shard,))
                self._writing.add(shard.file)
                yield shard

    def _wrote(self, shard: OutputShard) -> None:
        self._counted.add(shard.file)
        self._writing.discard(shard.file)
        self._leases.release(shard.file)
