"""A model to convert under all circumstances, and what must come of it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.checkpoints import assert_same_tensors, load, make_checkpoint
from support.conversions import STAGING, convert
from support.expected import fused_int8
from support.program import snapshot


@pytest.fixture(scope="session")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 MB in 3 shards, with zero points to check, files to copy and a folder."""
    root = make_checkpoint(
        tmp_path_factory.mktemp("large") / "model", layers=5, experts=8, hidden=512, intermediate=384, family="w1",
        scale_dtype=torch.bfloat16, zero_points=True, shards=3,
    )  # fmt: skip
    (root / "tokenizer.json").write_text('{"größe": 1}\n', "utf-8")
    (root / "original").mkdir()
    (root / "original" / "params.json").write_text("{}")
    return root


@pytest.fixture(scope="session")
def reference(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an undisturbed conversion, whose tensors were compared with torch."""
    out = convert(source, tmp_path_factory.mktemp("reference") / "out")
    assert_same_tensors(load(out), fused_int8(source))
    assert len(list(out.glob("*.safetensors"))) >= 5
    assert not (out / STAGING).exists()
    return snapshot(out)


@pytest.fixture
def small(tmp_path: Path) -> Path:
    """A few KB in 2 shards."""
    return make_checkpoint(tmp_path / "model", layers=2, zero_points=True)
