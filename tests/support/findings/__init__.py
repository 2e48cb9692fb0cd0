"""Cases of ``inspect``: a sound model, one thing changed, and the findings that follow.

The cases lie in the modules beside this one, by subject; a new one is one row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import torch

from support.model import Model

Found = tuple[str, str, str, int]
"""Severity, code, subject, count."""

O_PROJ: Final = "model.layers.0.self_attn.o_proj"
EXPERTS: Final = "model.layers.0.mlp.experts"
LATER: Final = "model.layers.1.mlp.experts"
MIXED: Final[Found] = ("warning", "mixed-scheme", "quantization_config", 1)


def nothing(_: object) -> None:
    pass


@dataclass(frozen=True)
class Case:
    name: str
    expected: tuple[Found, ...]
    change: Callable[[Model], object] = nothing
    damage: Callable[[Path], object] = nothing
    deep: bool = False


def rename(model: Model, old: str, new: str) -> None:
    for shard in model.shards:
        for name in [name for name in shard if old in name]:
            shard[name.replace(old, new)] = shard.pop(name)


def set_tensor(name: str, value: torch.Tensor) -> Callable[[Model], None]:
    return lambda model: model.set(name, value)


def remove(*prefixes: str) -> Callable[[Model], None]:
    return lambda model: model.remove(*prefixes)


def in_float(*prefixes: str) -> Callable[[Model], None]:
    return lambda model: model.to_float(*prefixes)


def configure(**changes: object) -> Callable[[Model], None]:
    return lambda model: model.quantization.update(changes)
