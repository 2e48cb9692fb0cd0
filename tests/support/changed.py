"""Copies of checkpoints with one change."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file


def damaged(source: Path, out: Path, tensor: str, change: float) -> Path:
    """A copy of a checkpoint with one tensor multiplied."""
    shutil.copytree(source, out)
    for file in out.glob("*.safetensors"):
        tensors = load_file(file)
        if tensor in tensors:
            tensors[tensor] = tensors[tensor] * change
            save_file(tensors, file, metadata={"format": "pt"})
    return out


def with_config(source: Path, out: Path, **settings: Any) -> Path:
    """A copy of a checkpoint with other settings."""
    shutil.copytree(source, out)
    config = json.loads((out / "config.json").read_text("utf-8"))
    (out / "config.json").write_text(json.dumps(config | settings), "utf-8")
    return out
