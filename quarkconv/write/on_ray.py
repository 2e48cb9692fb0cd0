"""A conversion as tasks of a Ray cluster: one for each shard. Ray schedules them, and runs those of a lost node again.

The nodes need quarkconv, the source and the output: a file system that all of them see, or an object store or the Hub
with credentials on each node. Ray starts no task of ours twice at the same time, except when it takes a node for lost;
then both write the same bytes.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Final

from quarkconv.cluster import ClusterTasks
from quarkconv.files.local import LocalFiles
from quarkconv.hub.locate import locate
from quarkconv.plan.manifest import Manifest
from quarkconv.plan.pieces import Check, OutputShard
from quarkconv.plan.plan import Plan
from quarkconv.plan.shares import ALL
from quarkconv.write.checks import check_float_rows, run_checks
from quarkconv.write.execution import Execution, open_source
from quarkconv.write.executor import Run
from quarkconv.write.output import output_at
from quarkconv.write.shares import finish_shares

TASK_BYTES: Final = 256 * 2**20
"""Memory that Ray reserves for a task."""
STREAM_CPUS: Final = 0.3
"""CPUs of a task that streams a shard: one task reads while others send their last parts, or begin and end."""
_CHECKS_OF_A_TASK: Final = 4096


@dataclass(frozen=True, slots=True)
class _Common:
    """What every task uses: it opens source and output by their names, on its own node."""

    plan: Plan
    digest: str
    origin: str
    location: Path | str
    jobs: int

    def execution(self) -> Execution:
        """The execution on this node."""
        path = Path(self.origin)
        files = LocalFiles(path) if path.is_dir() else locate(self.origin).files
        return Execution(self.plan, self.digest, files, output_at(self.location), self.jobs)


def write_on_ray(execution: Execution, address: str) -> Manifest:
    """Carry out a plan on a Ray cluster. The same call resumes, also after the driver was killed.

    All nodes must see the source and the output under the same names.

    Args:
        execution: the plan, its source and its output; its threads are those of a task.
        address: of the cluster, as ``ray.init`` takes it.

    Errors as of :func:`quarkconv.write.write.write_output`.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be reached.
    """
    plan, progress = execution.plan, execution.progress
    cpus = 1 if isinstance(execution.output.location, Path) else STREAM_CPUS
    with ClusterTasks(address, TASK_BYTES, cpus=cpus) as cluster:
        with _joined(execution) as run:
            run.destination.read_records(plan.shards)
            todo = [shard for shard in plan.shards if run.destination.finished(shard) is None]
            checked = run.destination.checks_hold(ALL)
        progress.advance(sum(shard.nbytes for shard in plan.shards) - sum(shard.nbytes for shard in todo))
        common = [cluster.put(_common(execution))]  # in a list, a reference stays one
        if not checked:
            starts = range(0, len(plan.checks), _CHECKS_OF_A_TASK)
            checks = [(_check, common, plan.checks[start : start + _CHECKS_OF_A_TASK]) for start in starts]
            rows = [(_check_rows, common)] if plan.options.quantizes else []
            for _ in cluster.run([*checks, *rows]):
                pass
        todo.sort(key=lambda shard: -shard.nbytes)  # so that all nodes end at about the same time
        for nbytes in cluster.run([(_write, common, shard) for shard in todo]):
            progress.advance(nbytes)
    manifest = execution.finished()
    if manifest is not None:
        return manifest
    with _joined(execution) as run:
        run.destination.record_checks(ALL)
        run.destination.discard_partial(plan.shards)  # of tasks whose node was lost
    return finish_shares(execution.silent())


@contextmanager
def _joined(execution: Execution) -> Iterator[Run]:
    with execution.opened() as sources, execution.joined(sources) as run:
        yield run


def _common(execution: Execution) -> _Common:
    location = execution.output.location
    return _Common(
        plan=execution.plan,
        digest=execution.digest,
        origin=execution.origin,
        location=location if isinstance(location, str) else location.absolute(),
        jobs=execution.jobs,
    )


@lru_cache(maxsize=1)
def _execution(common: Any) -> Execution:
    """The execution on this node. A process that runs several tasks of a conversion locates source and output once.

    The source has been compared with the plan by the process that started the tasks, and the output holds its ETags.
    """
    import ray

    found: _Common = ray.get(common)
    return found.execution()


def _write(common: list[Any], shard: OutputShard) -> int:
    """The task of a shard: write it, unless it is finished, and return its size in bytes."""
    execution = _execution(*common)
    with (
        closing(open_source(execution.source, execution.plan, _turn())) as sources,
        execution.rejoined(sources, shard) as run,
        run.writing(),
    ):
        if run.destination.has_locks:
            run.destination.discard_partial((shard,))  # of a task whose node was lost
        run.write_shards((shard,), execution.jobs)
    return shard.nbytes


def _turn() -> Path:
    """A file of this node that a task locks while it reads from a slow network."""
    import ray

    return Path(tempfile.gettempdir()) / f"quarkconv-reading-{ray.get_runtime_context().get_node_id()}"


def _check(common: list[Any], checks: tuple[Check, ...]) -> None:
    execution = _execution(*common)
    with closing(open_source(execution.source, execution.plan)) as sources:
        run_checks(checks, sources, execution.jobs)


def _check_rows(common: list[Any]) -> None:
    execution = _execution(*common)
    with closing(open_source(execution.source, execution.plan)) as sources:
        check_float_rows([execution.plan], sources, execution.jobs)
