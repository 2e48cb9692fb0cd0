"""A conversion as tasks of a Ray cluster: one for each shard. Ray schedules them, and runs those of a lost node again.

The nodes need quarkconv, the source and the output: a file system that all of them see, or an object store or the Hub
with credentials on each node. Ray starts no task of ours twice at the same time, except when it takes a node for lost;
then both write the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quarkconv.cluster import ClusterTasks
from quarkconv.files.local import LocalFiles
from quarkconv.hub.locate import locate
from quarkconv.plan.pieces import Check, OutputShard
from quarkconv.plan.plan import Plan
from quarkconv.plan.shares import Share
from quarkconv.progress import SILENT, Progress
from quarkconv.write.checks import check_float_rows, run_checks
from quarkconv.write.executor import Run
from quarkconv.write.joining import open_joined
from quarkconv.write.opening import files_of, opened
from quarkconv.write.output import finished_output
from quarkconv.write.shares import finish_shares
from quarkconv.write.state import JOINED

if TYPE_CHECKING:
    from quarkconv.files.base import Files
    from quarkconv.plan.manifest import Manifest

TASK_BYTES: Final = 256 * 2**20
"""Memory that Ray reserves for a task."""
_CHECKS_OF_A_TASK: Final = 4096
_ALL: Final = Share(1, 1)


def execute_on_ray(
    plan: Plan,
    source: Path | Files,
    output: Path | str,
    *,
    digest: str,
    jobs: int,
    address: str = "auto",
    progress: Progress = SILENT,
) -> Manifest:
    """Carry out a plan on a Ray cluster. The same call resumes, also after the driver was killed.

    Args:
        plan, source, output, digest, progress: as of :func:`quarkconv.write.executor.execute`.
        jobs: threads of a task.
        address: of the cluster, as ``ray.init`` takes it.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be reached; errors of
            :func:`quarkconv.write.executor.execute`.
    """
    folder = source.root if isinstance(source, LocalFiles) else source
    origin = str(folder.absolute() if isinstance(folder, Path) else folder)
    with ClusterTasks(address, TASK_BYTES) as cluster:
        with (
            opened(plan, digest, source, output, shares=JOINED) as (_, state),
            open_joined(output, state, files_of(plan)) as destination,
        ):
            todo = [shard for shard in plan.shards if destination.finished(shard) is None]
            checked = destination.checks_hold(_ALL)
        progress.advance(sum(shard.nbytes for shard in plan.shards) - sum(shard.nbytes for shard in todo))
        common = cluster.put((plan, origin, output, digest, jobs))
        if not checked:
            starts = range(0, len(plan.checks), _CHECKS_OF_A_TASK)
            checks = [(_check, common, plan.checks[start : start + _CHECKS_OF_A_TASK]) for start in starts]
            for _ in cluster.run([*checks, (_check_rows, common)]):
                pass
        for nbytes in cluster.run([(_write, common, shard.file) for shard in todo]):
            progress.advance(nbytes)
    if not checked:
        with (
            opened(plan, digest, source, output, shares=JOINED) as (_, state),
            open_joined(output, state, files_of(plan)) as destination,
        ):
            destination.record_checks(_ALL)
    manifest = finished_output(output, digest)
    return manifest or finish_shares(plan, source, output, digest=digest, jobs=jobs)


def _write(common: tuple[Any, ...], file: str) -> int:
    """The task of a shard: write it, unless it is finished, and return its size in bytes."""
    plan, _, output, _, jobs = common
    shards: tuple[OutputShard, ...] = tuple(shard for shard in plan.shards if shard.file == file)
    with _opened(common) as (sources, state), open_joined(output, state, files_of(plan)) as destination:
        run = Run(plan, sources, destination, SILENT)
        with run.writing():
            run.write_shards(shards, jobs)
    return sum(shard.nbytes for shard in shards)


def _check(common: tuple[Any, ...], checks: tuple[Check, ...]) -> None:
    with _opened(common) as (sources, _):
        run_checks(checks, sources, common[4])


def _check_rows(common: tuple[Any, ...]) -> None:
    with _opened(common) as (sources, _):
        check_float_rows(common[0], sources, common[4])


@contextmanager
def _opened(common: tuple[Any, ...]) -> Iterator[tuple[Any, dict[str, Any]]]:
    """The source of a plan on the node of a task."""
    plan, origin, output, digest, _ = common
    path = Path(origin)
    source = path if path.is_dir() else locate(origin).files
    with opened(plan, digest, source, output, shares=JOINED) as found:
        yield found
