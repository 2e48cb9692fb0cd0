"""Carrying a plan out with one process, which has the output alone."""

from __future__ import annotations

from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.plan.manifest import Manifest
from quarkconv.write.checks import check_float_rows, run_checks
from quarkconv.write.execution import Execution
from quarkconv.write.space import records_nbytes


def write_whole(execution: Execution, *, overwrite: bool) -> Manifest:
    """Write everything that an earlier run did not finish.

    Args:
        execution: the plan, its source and its output.
        overwrite: whether an earlier conversion in the output is deleted.

    Errors as of :func:`quarkconv.write.write.write_output`.
    """
    plan, jobs = execution.plan, execution.jobs
    needed = plan.output_bytes + records_nbytes(plan.shards)
    with execution.opened() as sources:
        run_checks(plan.checks, sources, jobs)
        if overwrite:  # before an earlier output is deleted; otherwise rows are checked when they are quantized
            check_float_rows([plan], sources, jobs)
        with execution.begun(sources, needed=needed, overwrite=overwrite) as run:
            try:
                with run.writing():
                    run.destination.discard_partial(plan.shards)
                    run.write_shards(plan.shards, jobs)
                    return run.finish()
            except (UnsupportedError, SourceError) as error:
                if isinstance(error, UnsupportedError) or error.code == "scale-invalid":
                    run.destination.discard()  # the same source never converts: nothing that was written is of use
                raise
