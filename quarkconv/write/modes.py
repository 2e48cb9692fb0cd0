"""How one process carries a plan out: alone, or as one of several that share the output."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from quarkconv.plan.shares import Share

if TYPE_CHECKING:
    from quarkconv.plan.manifest import Manifest
    from quarkconv.plan.plan import Plan


@dataclass(frozen=True, slots=True)
class Whole:
    """Write everything that an earlier run did not finish.

    Attributes:
        overwrite: whether an earlier conversion in the output is deleted.
        keep: whether an output that the same plan finished is kept where it is not deleted; otherwise it is refused.
    """

    overwrite: bool = False
    keep: bool = False


@dataclass(frozen=True, slots=True)
class Join:
    """Take shards by leases, together with other processes, until all are written, and finish."""


@dataclass(frozen=True, slots=True)
class Finish:
    """Finish a conversion whose shards are all written."""


@dataclass(frozen=True, slots=True)
class OnRay:
    """Write each shard as a task of a Ray cluster.

    Attributes:
        address: ``auto``, ``local``, ``HOST:PORT`` or ``ray://HOST:PORT``.
    """

    address: str = "auto"


Mode = Whole | Share | Join | Finish | OnRay
"""A :class:`quarkconv.plan.shares.Share` writes its shards; the last of the shares finishes."""


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one process contributed to an output.

    Attributes:
        manifest: the manifest, if this process saw the output finished.
        shards, nbytes: number and bytes of the shards that it wrote with :class:`Join`; those of all processes add up
            to the shards of the plan.
    """

    manifest: Manifest | None
    shards: int = 0
    nbytes: int = 0


def step_of(mode: Mode, plan: Plan) -> tuple[str, int]:
    """The name of the step that people see, and the bytes that it counts."""
    match mode:
        case Share():
            return f"Converting part {mode} to {plan.target}", mode.work(plan).nbytes
        case Join():
            return f"Converting to {plan.target} with others", plan.output_bytes
        case OnRay():
            return f"Converting to {plan.target} on Ray", sum(shard.nbytes for shard in plan.shards)
        case Finish():
            return "Finishing", plan.output_bytes
    return f"Converting to {plan.target}", plan.output_bytes
