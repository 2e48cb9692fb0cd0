"""Carrying a plan out, in any mode."""

from __future__ import annotations

from quarkconv.write.execution import Execution
from quarkconv.write.modes import Contribution, Finish, Join, Mode, OnRay, Whole, step_of
from quarkconv.write.whole import write_whole


def write_output(execution: Execution, mode: Mode) -> Contribution:
    """Carry a plan out, or this process's share of it. The same call resumes, and all modes write the same bytes.

    Args:
        execution: the plan, its source and its output.
        mode: how this process carries it out.

    Raises:
        UsageError: the output holds something else, or a conversion that was begun with something else.
        SourceError: a source file is not as long as planned, ends early, or changed meanwhile; or a scale has an
            invalid value, and then nothing is left in the output of one process.
        UnsupportedError: a zero point is not zero, two scales that must be equal are not, or a row cannot be quantized;
            nothing is left in the output.
        WriteError: writing failed, another process works on the output, or shares are missing; what was finished is
            kept.
        InterruptedByUser: interrupted; what was finished is kept.
    """
    # A working folder beside a finished output is the rest of a run that was killed as it ended.
    keeps = not mode.overwrite and (mode.keep or execution.output.has_begun()) if isinstance(mode, Whole) else True
    finished = execution.finished() if keeps else None
    name, nbytes = step_of(mode, execution.plan)
    execution.progress.step(name, nbytes, "byte")
    if finished is not None:
        execution.progress.advance(nbytes)
        return Contribution(finished)
    match mode:
        case Whole(overwrite):
            return Contribution(write_whole(execution, overwrite=overwrite))
        case Join():
            from quarkconv.write.joining import write_joined

            return write_joined(execution)
        case OnRay(address):
            from quarkconv.write.on_ray import write_on_ray

            return Contribution(write_on_ray(execution, address))
        case Finish():
            from quarkconv.write.shares import finish_shares

            return Contribution(finish_shares(execution))
    from quarkconv.write.shares import write_share

    return Contribution(write_share(execution, mode.work(execution.plan)))
