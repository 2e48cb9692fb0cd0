"""The part of a layer's experts that belongs to each rank.

Tensor parallel: every rank has all experts, and of each the rows of gate and up, and the columns of down, of its own
part of the intermediate size; the ranks' outputs add up. Expert parallel: every rank has some experts whole. The rules
are those of vLLM's loader (``RoutedExperts.load_weights``, ``determine_expert_map`` with linear placement).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal, NamedTuple

from quarkconv.errors import UnsupportedError, UsageError

Parallel = Literal["tp", "ep"]

RANK_KEY: Final = "quarkconv_rank"
"""Field of the config.json of a checkpoint that holds the part of one rank; a whole checkpoint has no such field."""
_MAX_RANKS: Final = 1024


class Rank(NamedTuple):
    """One of the ranks among which the experts of a layer are divided. A whole model is rank 0 of 1: :data:`WHOLE`.

    Attributes:
        parallel: ``tp`` for tensor parallel, ``ep`` for expert parallel.
        rank: number of the rank, from 0.
        world_size: number of ranks.
    """

    parallel: Parallel
    rank: int
    world_size: int

    @property
    def is_whole(self) -> bool:
        """True of the only rank, which has all experts whole."""
        return self.world_size == 1

    def experts(self, count: int) -> range:
        """The experts of the rank, of ``count``: contiguous; the first ``count % world_size`` ranks have one more."""
        if self.parallel == "tp":
            return range(count)
        least, more = divmod(count, self.world_size)
        start = self.rank * least + min(self.rank, more)
        return range(start, start + least + (self.rank < more))

    def intermediate(self, size: int) -> range:
        """The part of the intermediate size that the rank has, of ``size``."""
        if self.parallel == "ep":
            return range(size)
        part = size // self.world_size
        return range(self.rank * part, (self.rank + 1) * part)

    def check(self, prefix: str, experts: int, intermediate: int) -> None:
        """Refuse a layer that cannot be divided among this many ranks.

        Raises:
            UnsupportedError: the number of ranks does not divide the intermediate size, or exceeds that of experts.
        """
        if self.parallel == "tp" and intermediate % self.world_size:
            raise UnsupportedError(
                f"The intermediate size cannot be divided among {self.world_size} ranks",
                tensor=prefix,
                expected=f"a multiple of {self.world_size}",
                found=str(intermediate),
                hint="give another --tp, or --ep",
            )
        if self.parallel == "ep" and experts < self.world_size:
            raise UnsupportedError(
                "More ranks than experts",
                tensor=prefix,
                expected=f"{self.world_size} experts or more",
                found=str(experts),
                hint="give a smaller --ep, or --tp",
            )

    def folder(self) -> str:
        """Name of the rank's folder: ``rank-00-of-08``."""
        return f"rank-{self.rank:02d}-of-{self.world_size:02d}"

    def suffix(self) -> str:
        """The suffix of outputs of a conversion by rank: ``-tp8``; empty for a whole model."""
        return "" if self.is_whole else f"-{self.parallel}{self.world_size}"

    def to_json(self) -> dict[str, str | int]:
        """The value of :data:`RANK_KEY` in config.json."""
        return {"parallel": self.parallel, "rank": self.rank, "world_size": self.world_size}


WHOLE: Final = Rank("tp", 0, 1)
"""The rank of a model that is not divided."""


def make_rank(parallel: str, rank: int, world_size: int) -> Rank:
    """A rank, checked.

    Raises:
        UsageError: the rank, or the number of ranks, is out of range.
    """
    if parallel not in ("tp", "ep"):
        raise UsageError("Unknown kind of parallelism", expected="tp or ep", found=parallel)
    if not 1 <= world_size <= _MAX_RANKS or not 0 <= rank < world_size:
        raise UsageError(
            "The rank is out of range",
            expected=f"a rank from 0, below a number of ranks up to {_MAX_RANKS}",
            found=f"rank {rank} of {world_size}",
        )
    return Rank("tp" if parallel == "tp" else "ep", rank, world_size)


def ranks_of(tp: int, ep: int) -> list[Rank]:
    """All ranks of a tensor parallel or an expert parallel group; :data:`WHOLE` alone where both sizes are 1.

    Raises:
        UsageError: both sizes are given, or one is out of range.
    """
    if tp != 1 and ep != 1:
        raise UsageError("--tp and --ep exclude one another", expected="one of them", found="both")
    parallel, world_size = ("tp", tp) if tp != 1 else ("ep", ep)
    if world_size == 1:
        return [WHOLE]
    return [make_rank(parallel, number, world_size) for number in range(max(world_size, 1))]


def rank_of_config(config: Mapping[str, Any]) -> Rank:
    """The rank whose part a checkpoint holds; :data:`WHOLE` without the field, and where its value is invalid."""
    value = config.get(RANK_KEY)
    if not isinstance(value, dict):
        return WHOLE
    parallel, rank, world_size = value.get("parallel"), value.get("rank"), value.get("world_size")
    if not isinstance(parallel, str) or type(rank) is not int or type(world_size) is not int:
        return WHOLE
    try:
        return make_rank(parallel, rank, world_size)
    except UsageError:
        return WHOLE
