"""What one rank has of the routed experts of a model, by the headers of a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from quarkconv.description.description import describe
from quarkconv.errors import SourceError, UnsupportedError
from quarkconv.experts.ranks import ranks_of
from quarkconv.hub.locate import locate
from quarkconv.progress import SILENT, Progress


@dataclass(frozen=True, slots=True, order=True)
class RankShape:
    """The experts that one rank computes: w13 int8 [experts, 2 I, hidden], w2 int8 [experts, hidden, I].

    Attributes:
        experts: experts of the rank.
        top_k: experts that each token chooses, among those of all ranks.
        hidden, intermediate: H, and the part of I that the rank has.
        all_experts: experts of all ranks.
    """

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    all_experts: int

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Experts, top_k, hidden, intermediate: the key of quarkconv's own tables."""
        return self.experts, self.top_k, self.hidden, self.intermediate

    def mean_rows(self, tokens: int) -> float:
        """Rows that an expert has on average, for this many tokens."""
        return tokens * self.top_k / self.all_experts

    def __str__(self) -> str:
        return f"E={self.experts} K={self.top_k} H={self.hidden} I={self.intermediate}"


def whole(experts: int, top_k: int, hidden: int, intermediate: int) -> RankShape:
    """The shape of a rank that has all experts."""
    return RankShape(experts, top_k, hidden, intermediate, experts)


def checkpoint_shapes(model: str, tp: int = 1, ep: int = 1, progress: Progress = SILENT) -> tuple[RankShape, ...]:
    """The distinct shapes that the ranks of a group have of the MoE layers of a checkpoint, which need not be INT8.

    Args:
        model: directory, Hub repo or URL.
        tp, ep: size of the tensor parallel or of the expert parallel group.

    Raises:
        SourceError: there is nothing to read, or config.json does not give the number of experts per token.
        UnsupportedError: it has no routed experts with a gate, or they cannot be divided among the ranks.
        UsageError: both sizes are given, or one is out of range.
    """
    ranks = ranks_of(tp, ep)
    description = describe(locate(model).files, progress)
    layers = [layer for layer in description.moe_layers if layer.gated]
    if not layers:
        raise UnsupportedError(
            "The checkpoint has no routed experts with a gate",
            file=model,
            expected="experts with gate, up and down projections",
            found="no such layer",
            hint="give the sizes with --shape E,K,H,I",
        )
    top_k = description.config.top_k
    if top_k is None:
        raise SourceError(
            "config.json does not give the number of experts per token",
            code="config-invalid",
            file=f"{model}/config.json",
            expected="num_experts_per_tok",
            found="no such field",
            hint="give the sizes with --shape E,K,H,I",
        )
    shapes = set()
    for layer in layers:
        for rank in ranks:
            rank.check(layer.prefix, layer.experts, layer.intermediate)
            experts, columns = len(rank.experts(layer.experts)), len(rank.intermediate(layer.intermediate))
            shapes.add(RankShape(experts, top_k, layer.hidden, columns, layer.experts))
    return tuple(sorted(shapes))
