"""A rank's part of a layer, read from whole checkpoints of every layout and from folders by rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import make_checkpoint
from support.exports import Checkpoints

import quarkconv
from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.load.experts import FusedExperts

NAMES = (
    "qwen3_moe-quark0.13-f2f",
    "mixtral-quark0.11-eager",
    "step3p5-like-3key_fused",
    "qwen3_moe-quark0.11-eager-int8_static",
    "qwen3_moe-quark0.13-f2f-per_tensor_weight",
)


def part_of(whole: FusedExperts, parallel: str, rank: int, world_size: int) -> list[torch.Tensor | None]:
    """What a rank has, by slicing the whole tensors."""
    tensors = [whole.w13, whole.w13_scale, whole.w2, whole.w2_scale, whole.w13_input_scale, whole.w2_input_scale]
    if parallel == "ep":
        return [None if tensor is None else torch.tensor_split(tensor, world_size)[rank] for tensor in tensors]

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return torch.cat([half.chunk(world_size, dim=1)[rank] for half in tensor.chunk(2, dim=1)], dim=1)

    return [cut(whole.w13), cut(whole.w13_scale), whole.w2.chunk(world_size, dim=2)[rank], *tensors[3:]]


def assert_same(found: FusedExperts, expected: list[torch.Tensor | None]) -> None:
    have = [found.w13, found.w13_scale, found.w2, found.w2_scale, found.w13_input_scale, found.w2_input_scale]
    for tensor, right in zip(have, expected, strict=True):
        assert (tensor is None) is (right is None)
        if tensor is not None and right is not None:
            assert torch.equal(tensor, right)
            assert tensor.is_contiguous()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parallel", ["tp", "ep"])
def test_ranks_of_every_layout_are_loaded(checkpoints: Checkpoints, tmp_path: Path, name: str, parallel: str) -> None:
    source = checkpoints(name)
    fused = quarkconv.convert_checkpoint(source, "fused-int8", tmp_path / "fused").output
    tp, ep = (2, 1) if parallel == "tp" else (1, 2)
    divided = quarkconv.convert_checkpoint(source, "fused-int8", tmp_path / "ranks", tp=tp, ep=ep)
    layer = quarkconv.inspect_checkpoint(source).description.moe_layers[-1].index
    whole = quarkconv.load_fused_experts(fused, layer)
    for rank in range(2):
        expected = part_of(whole, parallel, rank, 2)
        for root in (source, fused, divided.output, divided.output / f"rank-0{rank}-of-02"):
            found = quarkconv.load_fused_experts(root, layer, rank=rank, world_size=2, parallel=parallel)
            assert_same(found, expected)


def test_the_bytes_of_other_ranks_do_not_matter(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model", layout="fused", shards=1, experts=4)
    before = [quarkconv.load_fused_experts(root, 0, rank=rank, world_size=2, parallel="ep") for rank in range(2)]
    name = "model.layers.0.mlp.experts.down_proj"
    refs = quarkconv.inspect_checkpoint(root).description.checkpoint.refs()
    with open(root / refs[name].file, "r+b") as handle:
        handle.seek(refs[name].start)
        handle.write(bytes([7]) * (refs[name].nbytes // 2))
    after = [quarkconv.load_fused_experts(root, 0, rank=rank, world_size=2, parallel="ep") for rank in range(2)]
    assert not torch.equal(before[0].w2, after[0].w2)
    assert torch.equal(before[1].w2, after[1].w2)


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    root = make_checkpoint(tmp_path / "model")
    with pytest.raises(UnsupportedError, match="cannot be divided"):
        quarkconv.load_fused_experts(root, 0, rank=0, world_size=3)
    with pytest.raises(UsageError, match="rank is out of range"):
        quarkconv.load_fused_experts(root, 0, rank=2, world_size=2)
    with pytest.raises(UsageError, match="Unknown kind of parallelism"):
        quarkconv.load_fused_experts(root, 0, rank=0, world_size=2, parallel="pp")
    quarkconv.convert_checkpoint(root, "fused-int8", tmp_path / "out", tp=2)
    with pytest.raises(UsageError, match="divided among ranks differently"):
        quarkconv.load_fused_experts(tmp_path / "out" / "rank-00-of-02", 0, rank=1, world_size=2)
    assert quarkconv.load_fused_experts(tmp_path / "out" / "rank-01-of-02", 0).intermediate_size == 10
