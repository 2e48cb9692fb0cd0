"""Checkpoints to evaluate, and token ids to evaluate them on."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from quarkconv import convert_checkpoint
from quarkconv.evaluate.windows import windows_of_text

TINY = Path(__file__).parents[2] / "examples" / "tiny_moe" / "quark-ptpc_int8"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="no GPU: torch.cuda.is_available() is false"))


@pytest.fixture(autouse=True)
def _state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """States go to a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield
    left = list((tmp_path / "cache").rglob("*.safetensors"))
    assert not left or os.environ.get("LEAVES_STATE"), f"a state is left behind: {left}"


@pytest.fixture(scope="session")
def token_ids(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five windows of 24 tokens of the text that the small model was not trained on."""
    path = tmp_path_factory.mktemp("tokens") / "ids.safetensors"
    windows = windows_of_text(TINY.parent / "heldout.txt", TINY / "tokenizer.json", 24, 5)
    save_file({"token_ids": windows.ids}, path)
    return path


@pytest.fixture(scope="session")
def quantized() -> Path:
    """A trained qwen3_moe of 1.5 million parameters, quantized by Quark 0.13 file to file."""
    return TINY


@pytest.fixture(scope="session")
def unquantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that the small one could have been quantized from: its weights, each off by up to 0.4 of a step."""
    folder = convert_checkpoint(TINY, "bf16", tmp_path_factory.mktemp("unquantized") / "model").output
    generator = torch.Generator().manual_seed(11)
    for file in folder.glob("*.safetensors"):
        tensors = load_file(file)
        for name, tensor in tensors.items():
            if tensor.dim() == 2 and ("_proj" in name):
                step = tensor.float().abs().amax(1, keepdim=True) / 127
                noise = (torch.rand(tensor.shape, generator=generator) - 0.5) * 0.8
                tensors[name] = (tensor.float() + noise * step).to(tensor.dtype)
        save_file(tensors, file, metadata={"format": "pt"})
    return folder
