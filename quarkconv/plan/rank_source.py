"""The part of a layer's experts that one rank has, as pieces of the source."""

from __future__ import annotations

from dataclasses import dataclass

from quarkconv.experts.naming import Role
from quarkconv.experts.ranks import Rank
from quarkconv.plan.experts import ExpertSource
from quarkconv.plan.pieces import Piece
from quarkconv.scheme.spec import PER_CHANNEL

_ALONE = Rank("tp", 0, 1)


@dataclass(frozen=True, slots=True)
class RankSource(ExpertSource):
    """The experts of one layer, cut to what a rank has of them.

    Rows of gate and up lie one after the other, and are a range. Columns of down are a run in every row. Its scale has
    an element for each row, and so is the same for all ranks.

    Attributes:
        rank: the rank.
    """

    rank: Rank = _ALONE

    @property
    def experts(self) -> range:
        return self.rank.experts(self.layer.experts)

    @property
    def intermediate(self) -> int:
        return len(self.rank.intermediate(self.layer.intermediate))

    def weight(self, role: Role, expert: int) -> Piece:
        piece = ExpertSource.weight(self, role, expert)
        whole, part = self.layer.intermediate, self.rank.intermediate(self.layer.intermediate)
        if len(part) == whole:
            return piece
        if role == "down":
            nbytes = self.layer.hidden * len(part)
            return piece._replace(start=piece.start + part.start, nbytes=nbytes, run=len(part), stride=whole)
        row = self.layer.hidden
        return piece._replace(start=piece.start + part.start * row, nbytes=len(part) * row)

    def scale(self, role: Role, expert: int) -> Piece:
        piece = ExpertSource.scale(self, role, expert)
        if role == "down" or self.granularity(role, expert) != PER_CHANNEL:
            return piece
        part = self.rank.intermediate(self.layer.intermediate)
        size = piece.nbytes // self.layer.intermediate
        return piece._replace(start=piece.start + part.start * size, nbytes=len(part) * size)
