"""What ranks have of the experts of a checkpoint, by its headers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.model import Model, experts

from quarkconv import SourceError, UnsupportedError, UsageError
from quarkconv.tune.shapes import RankShape, checkpoint_shapes, whole

QWEN = "qwen3_moe-quark0.13-f2f"


def test_a_whole_model_has_one_shape(checkpoints: Any) -> None:
    assert checkpoint_shapes(str(checkpoints(QWEN))) == (whole(8, 3, 128, 96),)


@pytest.mark.parametrize(
    ("tp", "ep", "expected"),
    [
        (2, 1, [RankShape(8, 3, 128, 48, 8)]),
        (4, 1, [RankShape(8, 3, 128, 24, 8)]),
        (1, 2, [RankShape(4, 3, 128, 96, 8)]),
        (1, 3, [RankShape(2, 3, 128, 96, 8), RankShape(3, 3, 128, 96, 8)]),  # 8 = 3 + 3 + 2
    ],
    ids=str,
)
def test_ranks_share_the_experts(checkpoints: Any, tp: int, ep: int, expected: list[RankShape]) -> None:
    assert checkpoint_shapes(str(checkpoints(QWEN)), tp, ep) == tuple(expected)


@pytest.mark.parametrize("name", ["qwen3_moe-bf16", "step3p5-like-3key_fused", "minimax_m2-quark0.13-f2f"])
def test_layout_and_dtype_of_the_experts_do_not_matter(checkpoints: Any, name: str) -> None:
    [shape] = checkpoint_shapes(str(checkpoints(name)))
    assert shape.experts == shape.all_experts
    assert shape.mean_rows(shape.experts) == shape.top_k


def test_layers_of_different_sizes_give_several_shapes(tmp_path: Path) -> None:
    model = Model()
    model.remove("model.layers.1.mlp.experts.")
    model.second |= experts("model.layers.1.mlp.experts", range(3), 8, 2)
    assert [shape.sizes[2:] for shape in checkpoint_shapes(str(model.write(tmp_path / "m")))] == [(8, 2), (8, 4)]


def test_what_cannot_be_read_or_divided_is_refused(checkpoints: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedError, match="cannot be divided among 5 ranks"):
        checkpoint_shapes(str(checkpoints(QWEN)), tp=5)
    with pytest.raises(UnsupportedError, match="More ranks than experts"):
        checkpoint_shapes(str(checkpoints(QWEN)), ep=9)
    with pytest.raises(UsageError, match="--tp and --ep exclude one another"):
        checkpoint_shapes(str(checkpoints(QWEN)), tp=2, ep=2)
    with pytest.raises(UnsupportedError, match="no routed experts"):
        checkpoint_shapes(str(checkpoints("qwen3-0.13-f2f-dense")))
    with pytest.raises(SourceError):
        checkpoint_shapes(str(tmp_path))
