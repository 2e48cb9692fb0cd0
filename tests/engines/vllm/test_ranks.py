"""Experts divided among ranks, beside what vLLM's loader keeps on a rank of the Quark export as it came."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from engines.expected import RANKS, Rank
from engines.forms import QUARK, Forms
from engines.vllm.loading import build, load
from support.checkpoints import Tensors
from support.checkpoints import load as load_tensors

import quarkconv

LAYER = 1
EXPORTS = {
    "qwen3_moe-quark0.13-f2f": ("model.layers.1.mlp.experts", "gate_up_proj", "down_proj"),
    "mixtral-quark0.11-eager": ("model.layers.1.block_sparse_moe.experts", "w13", "w2"),
    "minimax_m2-quark0.13-f2f": ("model.layers.1.block_sparse_moe.experts", "w13", "w2"),
}
"""Export -> prefix of the experts of a layer, and names of the fused tensors."""

DIVIDED = (*RANKS[1:], Rank(4, 2), Rank(4, 3, True))


@cache
def kept_by_vllm(source: Path, prefix: str, rank: Rank) -> Tensors:
    """w13, w13_scale, w2 and w2_scale of a layer on a rank."""
    experts = load(build(source, rank), rank).get_submodule(f"{prefix}.routed_experts")
    kept = {}
    for half in ("w13", "w2"):
        kept[half] = getattr(experts, f"{half}_weight").data
        kept[f"{half}_scale"] = getattr(experts, f"{half}_weight_scale").data.unsqueeze(-1)
    return kept


@pytest.mark.parametrize("rank", DIVIDED, ids=str)
@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_read_for_a_rank(forms: Forms, name: str, rank: Rank) -> None:
    parallel = "ep" if rank.expert_parallel else "tp"
    kept = kept_by_vllm(forms.source(name), EXPORTS[name][0], rank)
    for form in (QUARK, "fused-int8", "compressed-tensors"):
        experts = quarkconv.load_fused_experts(
            forms(name, form), LAYER, rank=rank.rank, world_size=rank.size, parallel=parallel
        )
        for key, tensor in kept.items():
            assert torch.equal(getattr(experts, key), tensor), (form, key)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("parallel", ["tp", "ep"])
@pytest.mark.parametrize("name", EXPORTS)
def test_what_is_written_for_a_rank(forms: Forms, tmp_path: Path, name: str, parallel: str, size: int) -> None:
    prefix, both, last = EXPORTS[name]
    out, source = tmp_path / "out", forms.source(name)
    tp, ep = (size, 1) if parallel == "tp" else (1, size)
    result = quarkconv.convert_checkpoint(source, "fused-int8", out, jobs=1, tp=tp, ep=ep)
    for number in range(size):
        kept = kept_by_vllm(source, prefix, Rank(size, number, parallel == "ep"))
        written = load_tensors(result.output / f"rank-{number:02d}-of-{size:02d}")
        for key, leaf in (("w13", both), ("w13_scale", f"{both}_scale"), ("w2", last), ("w2_scale", f"{last}_scale")):
            assert torch.equal(written[f"{prefix}.{leaf}"], kept[key]), (number, key)
