"""Carrying out a plan in shares: several processes, on one machine or several, with one output.

In a directory, each process holds ``.quarkconv/lock`` together with the others, and ``.quarkconv/share-K-of-N`` alone.
The one that finds all shards written takes ``lock`` alone, and finishes. The locks end with their processes, however
those end.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import chain

from quarkconv.errors import UsageError, WriteError
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.plan import Plan
from quarkconv.plan.shares import Share, ShareWork
from quarkconv.write.checks import run_checks
from quarkconv.write.execution import Execution
from quarkconv.write.executor import Run
from quarkconv.write.locks import OutputBusyError


def write_share(execution: Execution, work: ShareWork) -> Manifest | None:
    """Carry out one share of a plan, and finish the conversion if all shares are written.

    Several processes, on several machines, may work on the shares of one output at the same time; the file system of a
    directory must have locks (flock).

    Args:
        execution: the plan, its source and its output.
        work: the share, and its part of the plan.

    Returns:
        The manifest, if the conversion is finished; None while shares are missing.

    Errors as of :func:`quarkconv.write.write.write_output`.
    """
    try:
        manifest, complete = _write(execution, work)
        return _finish(execution) if complete and manifest is None else manifest
    except UsageError:  # another process may have finished the conversion meanwhile
        manifest = execution.finished()
        if manifest is None:
            raise
        return manifest


def _write(execution: Execution, work: ShareWork) -> tuple[Manifest | None, bool]:
    """Write the shards of a share.

    Returns:
        The manifest, where the conversion could be finished at once, and whether the shards of all shares are written.
    """
    plan = execution.plan
    with execution.opened() as sources, execution.joined(sources, work.share) as run, run.writing():
        destination = run.destination
        if not destination.checks_hold(work.share):
            run_checks(work.checks, sources, execution.jobs)
            destination.record_checks(work.share)
        else:  # an earlier process began the share
            destination.discard_partial(work.shards)
        run.write_shards(work.shards, execution.jobs)
        destination.refresh()
        if not all(map(destination.is_listed, plan.shards)):
            return None, False
        destination.read_records(plan.shards)
        if not all(map(destination.finished, plan.shards)):
            return None, False
        if destination.has_locks:  # it has to be locked alone
            return None, True
        run.end_progress()
        return _complete(run, _works(plan, work.share.count), execution.jobs), True


def _finish(execution: Execution) -> Manifest | None:
    try:
        return finish_shares(execution.silent())
    except OutputBusyError:  # another process finishes, or will: it still holds the lock of its share
        return None


def finish_shares(execution: Execution) -> Manifest:
    """Finish a conversion whose shares are written: copy other files, and write index, manifest and config.json.

    Errors as of :func:`quarkconv.write.write.write_output`.

    Raises:
        UsageError: nothing was begun in the output.
        WriteError: shards are missing.
    """
    plan, location = execution.plan, str(execution.output.location)
    if not execution.output.has_begun():
        raise UsageError(
            "The output has no unfinished conversion",
            file=location,
            expected="parts of a conversion",
            hint="write the parts first: --part 1/N, or --join",
        )
    with execution.opened() as sources, execution.begun(sources) as run:
        destination = run.destination
        count = destination.shares()
        destination.read_records(plan.shards)
        works = _works(plan, max(count, 1))
        missing = [work.share for work in works if not all(map(destination.finished, work.shards))]
        if missing:
            raise WriteError(
                "Parts of the conversion are missing",
                file=location,
                expected=f"{len(works)} parts",
                found=f"{len(works) - len(missing)} finished",
                hint="run " + (", ".join(f"--part {share}" for share in missing[:5]) if count else "--join") + " again",
            )
        with run.writing():
            return _complete(run, works, execution.jobs)


def _works(plan: Plan, count: int) -> list[ShareWork]:
    """The work of each of some number of shares."""
    return [Share(number, count).work(plan) for number in range(1, count + 1)]


def _complete(run: Run, works: Iterable[ShareWork], jobs: int) -> Manifest:
    """Run the checks that no share has recorded, and write everything that is missing."""
    unchecked = (work.checks for work in works if not run.destination.checks_hold(work.share))
    run_checks(tuple(chain.from_iterable(unchecked)), run.sources, jobs)
    run.write_shards(run.plan.shards, jobs)
    return run.finish()
