"""Checkpoints to evaluate, and token ids to evaluate them on."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

VOCABULARY = 320


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """States go to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    left = list((tmp_path / "cache").rglob("*.safetensors"))
    assert not left or os.environ.get("LEAVES_STATE"), f"a state is left behind: {left}"


@pytest.fixture(scope="session")
def token_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five windows of 24 random tokens."""
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    generator = torch.Generator().manual_seed(7)
    save_file({"token_ids": torch.randint(0, VOCABULARY, (5, 24), generator=generator)}, path)
    return path


@pytest.fixture(scope="session")
def quantized(checkpoints: Callable[[str], Path]) -> Path:
    """A real Quark export of a small qwen3_moe."""
    return checkpoints("qwen3_moe-quark0.13-f2f")


@pytest.fixture(scope="session")
def unquantized(checkpoints: Callable[[str], Path]) -> Path:
    """The same model before quantization."""
    return checkpoints("qwen3_moe-bf16")
