"""Tasks on a Ray cluster. Ray schedules them, runs those of a lost node again, and reserves what they need."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import Any, Final

from quarkconv.errors import QuarkconvError, UsageError, WriteError, interrupted

RETRIES: Final = 20
"""Times that a task is run again whose process or node died."""
_POLL_SECONDS: Final = 1.0


class ClusterTasks:
    """A connection to a Ray cluster; a context manager.

    Args:
        address: ``auto``, ``local``, ``HOST:PORT`` or ``ray://HOST:PORT``, as ``ray.init`` takes it. An existing
            connection of this process is used as it is.
        memory: bytes that are reserved for a task.
        gpus: GPUs that are reserved for a task.
        cpus: CPUs that are reserved for a task.

    Raises:
        UsageError: Ray is not installed, or the cluster cannot be reached.
    """

    def __init__(self, address: str, memory: int, gpus: int = 0, cpus: float = 1) -> None:
        self._address = address
        self._resources = {"num_cpus": cpus, "memory": memory, "num_gpus": gpus, "max_retries": RETRIES}
        self._owned = False

    def __enter__(self) -> ClusterTasks:
        try:
            import ray
        except ImportError as error:
            raise UsageError("Ray is not installed", expected="the package ray", hint="pip install ray") from error
        if not ray.is_initialized():
            try:
                ray.init(address=self._address, log_to_driver=False, logging_level="error")
            except Exception as error:  # ConnectionError, ValueError, and Ray's own
                first = str(error).splitlines()[0] if str(error) else type(error).__name__
                raise UsageError(
                    "The Ray cluster cannot be reached",
                    expected="the address of a cluster, or `local`",
                    found=f"{self._address}: {first}"[:300],
                    hint="start one with `ray start --head`, or give its address",
                ) from error
            self._owned = True
        return self

    def __exit__(self, *_: object) -> None:
        if self._owned:
            import ray

            ray.shutdown()

    def put(self, value: Any) -> Any:
        """A reference to a value that every task gets; it is sent to each node once."""
        import ray

        return ray.put(value)

    def run(self, tasks: Sequence[tuple[Callable[..., Any], *tuple[Any, ...]]]) -> Iterator[Any]:
        """The results of some tasks, in the order in which they finish.

        Args:
            tasks: functions of modules with their arguments; references are replaced by their values.

        Raises:
            QuarkconvError: of a task; the others are cancelled.
            WriteError: a task was lost more often than it is run again.
            InterruptedByUser: interrupted.
        """
        import ray

        functions = {task: ray.remote(task).options(**self._resources) for task, *_ in tasks}  # each is sent once
        pending = [functions[task].remote(*arguments) for task, *arguments in tasks]
        try:
            while pending:
                done, pending = ray.wait(pending, timeout=_POLL_SECONDS)
                for reference in done:
                    yield ray.get(reference)
        except KeyboardInterrupt:
            raise interrupted() from None
        except ray.exceptions.RayTaskError as error:
            if isinstance(error.cause, QuarkconvError):
                raise error.cause from None
            raise
        except ray.exceptions.RayError as error:
            raise WriteError(
                "The Ray cluster lost a task",
                found=str(error).strip().splitlines()[0][:300],
                hint="check the nodes, then run the same command again: it resumes where it stopped",
            ) from error
        finally:
            for reference in pending:
                with suppress(Exception):  # the cluster is gone
                    ray.cancel(reference, force=True)
