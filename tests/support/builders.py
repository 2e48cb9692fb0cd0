"""Small checkpoints to inspect: sound ones made with torch and safetensors' own writer, and files made by hand."""

from __future__ import annotations

import copy
import json
import struct
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

Tensors = dict[str, torch.Tensor]

FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"

WEIGHT: dict[str, Any] = {
    "dtype": "int8", "qscheme": "per_channel", "ch_axis": 0, "is_dynamic": False, "symmetric": True,
    "group_size": None, "observer_cls": "PerChannelMinMaxObserver",
}  # fmt: skip
INPUT = {**WEIGHT, "ch_axis": 1, "is_dynamic": True}
TENSOR_WEIGHT = {**WEIGHT, "qscheme": "per_tensor", "ch_axis": None}
STATIC_INPUT = TENSOR_WEIGHT


def raw_file(header: object, data: bytes = b"", *, length: int | None = None) -> bytes:
    """A safetensors file put together by hand; ``header`` is text, bytes, or what becomes JSON."""
    if not isinstance(header, bytes):
        header = (header if isinstance(header, str) else json.dumps(header, separators=(",", ":"))).encode()
    return struct.pack("<Q", len(header) if length is None else length) + header + data


def entry(dtype: str, shape: list[Any], start: int, end: int) -> dict[str, Any]:
    """A tensor in a header."""
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def layer_config(weight: object = WEIGHT, inputs: object = INPUT) -> dict[str, Any]:
    """A QLayerConfig as Quark writes it."""
    config = {"weight": weight, "input_tensors": inputs, "output_tensors": None, "bias": None, "target_device": None}
    return copy.deepcopy(config)


def quark_config(**changes: object) -> dict[str, Any]:
    """A quantization_config as Quark 0.13 writes it: everything ptpc_int8."""
    return {
        "quant_method": "quark", "version": "0.13", "global_quant_config": layer_config(), "exclude": [],
        "layer_quant_config": {}, "layer_type_quant_config": {}, "kv_cache_quant_config": {},
        "quant_mode": "eager_mode", "export": {"pack_method": "reorder", "weight_format": "real_quantized"},
        **copy.deepcopy(changes),
    }  # fmt: skip


def int8_linear(module: str, rows: int, columns: int) -> Tensors:
    """A linear as Quark 0.13 writes it file to file."""
    return {
        f"{module}.weight": torch.randint(-127, 128, (rows, columns), dtype=torch.int8),
        f"{module}.weight_scale": torch.rand(rows) + 0.01,
    }


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
    """A sound ptpc_int8 model of two MoE layers in two shards, to be spoilt before it is written.

    Of each layer, ``o_proj`` and three experts are int8, 10 modules; the router is BF16.
    """

    config: dict[str, Any] = field(default_factory=dict)
    first: Tensors = field(default_factory=dict)
    second: Tensors = field(default_factory=dict)
    weight_map: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        self.config |= {
            "model_type": "qwen3_moe", "num_hidden_layers": 2, "num_experts": 3, "num_experts_per_tok": 2,
            "hidden_act": "silu",
            "quantization_config": quark_config(
                exclude=["lm_head", "model.layers.0.mlp.gate", "model.layers.1.mlp.gate"]
            ),
        }  # fmt: skip
        self.first |= {
            "model.embed_tokens.weight": torch.rand(16, 8).bfloat16(),
            "model.norm.weight": torch.ones(8).bfloat16(),
            "lm_head.weight": torch.rand(16, 8).bfloat16(),
        }
        for layer, shard in ((0, self.first), (1, self.second)):
            shard |= int8_linear(f"model.layers.{layer}.self_attn.o_proj", 8, 8)
            shard |= experts(f"model.layers.{layer}.mlp.experts", range(3))
            shard[f"model.layers.{layer}.mlp.gate.weight"] = torch.rand(3, 8).bfloat16()
            shard[f"model.layers.{layer}.input_layernorm.weight"] = torch.ones(8).bfloat16()

    @property
    def quantization(self) -> dict[str, Any]:
        return self.config["quantization_config"]

    @property
    def shards(self) -> tuple[Tensors, Tensors]:
        return self.first, self.second

    def shard(self, tensor: str) -> Tensors:
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
        folder.mkdir(parents=True, exist_ok=True)
        weight_map = {name: file for file, shard in ((SECOND, self.second), (FIRST, self.first)) for name in shard}
        for file, shard in ((FIRST, self.first), (SECOND, self.second)):
            save_file(shard, folder / file)
        write_json(folder / INDEX, {"weight_map": self.weight_map or weight_map})
        write_json(folder / "config.json", self.config)
        return folder


def write_json(path: Path, value: object) -> None:
    path.write_text(json.dumps(value))
