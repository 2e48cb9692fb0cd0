"""A checkpoint that several workers convert, and its conversion by one process."""

from __future__ import annotations

from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.conversions import SHARD_SIZE
from support.program import snapshot

import quarkconv


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "model", layers=3, experts=4, zero_points=True, shards=3)


@pytest.fixture
def whole(model: Path, tmp_path: Path) -> dict[str, str]:
    return snapshot(
        quarkconv.convert_checkpoint(model, "fused-int8", tmp_path / "whole", max_shard_size=SHARD_SIZE).output
    )
