"""A small checkpoint to change before it is written: the start of each test of a checkpoint that is wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch
from safetensors.torch import save_file

from support.checkpoints import Tensors, fill, with_class
from support.moe_model import INDEX, MoeModel, shard_name
from support.raw import write_json

FIRST: Final = shard_name(1, 2)
SECOND: Final = shard_name(2, 2)

_TWO_LAYERS: Final = MoeModel(
    layers=2, hidden=8, intermediate=4, attention=("o_proj",), norms=("input_layernorm",)
)  # fmt: skip


def int8_linear(module: str, rows: int, columns: int) -> Tensors:
    """A linear as Quark 0.13 writes it file to file."""
    return fill(dict(MoeModel().linear(module, rows, columns)))


def experts(prefix: str, numbers: Iterable[int], hidden: int = 8, intermediate: int = 4) -> Tensors:
    """Routed experts, one by one."""
    tensors: Tensors = {}
    for number in numbers:
        for name in ("gate_proj", "up_proj"):
            tensors |= int8_linear(f"{prefix}.{number}.{name}", intermediate, hidden)
        tensors |= int8_linear(f"{prefix}.{number}.down_proj", hidden, intermediate)
    return tensors


@dataclass
class Model:
    """A sound ptpc_int8 model of two MoE layers, one in each of two shards, to be changed before it is written.

    Of each layer, ``o_proj`` and three experts are int8, 10 modules; the router is BF16.
    """

    config: dict[str, Any] = field(default_factory=_TWO_LAYERS.config)
    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)
    weight_map: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        self.config["norm_topk_prob"] = True
        self.quantization["exclude"] = ["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
        for name, tensor in fill(_TWO_LAYERS.tensors()).items():
            (self.second if name.startswith("model.layers.1.") else self.first)[name] = tensor

    @property
    def quantization(self) -> dict[str, Any]:
        """The quantization_config."""
        found: dict[str, Any] = self.config["quantization_config"]
        return found

    @property
    def shards(self) -> tuple[Tensors, Tensors]:
        """The tensors of both files."""
        return self.first, self.second

    def shard(self, tensor: str) -> Tensors:
        """The shard that has a tensor."""
        return next(shard for shard in self.shards if tensor in shard)

    def set(self, tensor: str, value: torch.Tensor) -> None:
        """Replace a tensor, or add it to the first shard."""
        next((shard for shard in self.shards if tensor in shard), self.first)[tensor] = value

    def remove(self, *prefixes: str) -> None:
        """Remove every tensor that starts with one of the prefixes."""
        for shard in self.shards:
            for name in [name for name in shard if name.startswith(prefixes)]:
                del shard[name]

    def to_float(self, *prefixes: str) -> None:
        """Store as BF16, without scales, every int8 module that starts with one of the prefixes."""
        for shard in self.shards:
            for name in [name for name in shard if name.startswith(prefixes)]:
                if name.endswith("_scale"):
                    del shard[name]
                elif shard[name].dtype == torch.int8:
                    shard[name] = shard[name].bfloat16()

    def write(self, folder: Path) -> Path:
        """Write both shards, the index and config.json; returns ``folder``."""
        folder.mkdir(parents=True, exist_ok=True)
        weight_map = {name: file for file, shard in ((SECOND, self.second), (FIRST, self.first)) for name in shard}
        for file, shard in ((FIRST, self.first), (SECOND, self.second)):
            save_file(shard, folder / file)
        write_json(folder / INDEX, {"weight_map": self.weight_map or weight_map})
        write_json(folder / "config.json", with_class(self.config))
        return folder


def edited(edit: Callable[[str, torch.Tensor], dict[str, torch.Tensor]]) -> Model:
    """A model with each tensor replaced by others."""
    model = Model()
    for shard in model.shards:
        for name in list(shard):
            shard |= edit(name, shard.pop(name))
    return model
