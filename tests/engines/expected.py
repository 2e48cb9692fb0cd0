"""What the parameters of an engine's model must hold after loading, stacked with torch from the Quark export itself.

An engine merges linears (q, k, v into one), stacks experts, and keeps of each what its rank computes: rows of the
weight and of the scales of a column-parallel linear; columns of the weight, and all scales, of a row-parallel one; with
expert parallelism, whole experts.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import Tensors, load
from support.expected import fused_int8

MERGED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "fused_qkv_a_proj": ("q_a_proj", "kv_a_proj_with_mqa"),
    "fused_qkv_a_proj_with_mqa": ("q_a_proj", "kv_a_proj_with_mqa"),
    "in_proj_qkvz": ("in_proj_qkv", "in_proj_z"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
    "in_proj_qkvgfab": ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"),
    "fused_qkvbfg_a_proj": ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj", "g_a_proj"),
    "qkv_conv1d": ("q_conv1d", "k_conv1d", "v_conv1d"),
    "wk_weights_proj": ("wk", "weights_proj"),
    "input_mix_weight_down_block_inject": ("input_mix_weight_down", "block_inject_weight"),
}
"""A linear of an engine -> the linears of the checkpoint that it holds, in order."""

_MERGED_OF: dict[str, dict[str, tuple[str, ...]]] = {
    "deepseek_v4": {"gate_up_proj": ("w1", "w3"), "fused_wqa_wkv": ("wq_a", "wkv"), "wqkv_a": ("wq_a", "wkv")},
    "kimi_linear": {"conv1d": ("q_conv1d", "k_conv1d", "v_conv1d")},
    "qwen4_exp_text": {"qkv_proj": ("q_proj", "k_proj", "v_proj", "indexer.index_qk_proj")},
}
"""The same, for model types that merge more."""

_COLUMN = {
    "q_proj", "k_proj", "v_proj", "q_b_proj", "kv_b_proj", "g_proj", "gate_proj", "up_proj", "embed_tokens", "lm_head",
}  # fmt: skip
_ROW = {"o_proj", "down_proj"}
_SHARDED_NORMS = {"minimax_m2": {"q_norm", "k_norm"}}
"""Model type -> norms over all heads at once, of which a rank has those of its heads."""

_ENCODERS = ("visual", "vision_model", "vision_tower", "resampler_model", "mm_projector")
"""Modules of models that the checkpoints in wrapped.py leave out."""
_ROUTED = re.compile(r"(?P<experts>.+\.experts)\.(?:routed_experts\.)?(?P<half>w13|w2)_(?P<leaf>weight|weight_scale)")
_ROUTED_INPUT = re.compile(r"(?P<experts>.+\.experts)\.(?:routed_experts\.)?(?P<half>w13|w2)_input_scale")


@dataclass(frozen=True)
class Rank:
    """A rank of a group of ``size``, that shares experts out by slices, or as wholes."""

    size: int = 1
    rank: int = 0
    expert_parallel: bool = False

    def __str__(self) -> str:
        return f"{'ep' if self.expert_parallel else 'tp'}{self.size}-{self.rank}"

    def part(self, tensor: torch.Tensor, axis: int) -> torch.Tensor:
        """The slice of a tensor."""
        return tensor.chunk(self.size, axis)[self.rank]


WHOLE = Rank()
RANKS = (WHOLE, Rank(2, 0), Rank(2, 1), Rank(2, 0, True), Rank(2, 1, True))


class Stacked:
    """The tensors of a Quark export in the form of fused-int8, and what an engine's parameters must be.

    Attributes:
        tensors: the experts of a layer in two tensors, every other int8 linear with scales F32 [out, 1].
        dequantized: the same in BF16, without scales: code * scale in F32, rounded once.
        config: the config.json of the export.
    """

    def __init__(self, source: Path) -> None:
        self.config = json.loads((source / "config.json").read_text())
        float_experts = _stacked_float_experts(load(source))
        prefixes = tuple(f"{name.rpartition('.')[0]}.{digit}" for name in float_experts for digit in range(10))
        left = {name: tensor for name, tensor in fused_int8(source).items() if not name.startswith(prefixes)}
        self.tensors = left | float_experts
        self._columns = _COLUMN | _SHARDED_NORMS.get(self.config["model_type"], set())
        self._merged = MERGED | _MERGED_OF.get(self.config["model_type"], {})
        self._outer = any(name.startswith("language_model.") for name in self.tensors)
        self.dequantized = dict(self.tensors)
        for name, codes in self.tensors.items():
            if codes.dtype == torch.int8:
                self.dequantized[name] = (codes.float() * self.dequantized.pop(f"{name}_scale")).bfloat16()

    def parameter(self, name: str, rank: Rank, *, dequantized: bool = False) -> torch.Tensor:
        """What the parameter ``name`` of an engine's model must hold on a rank."""
        tensors = self.dequantized if dequantized else self.tensors
        if not self._outer:
            inner = {"language_model.model.": "model.language_model.", "language_model.": ""}
            name = re.sub(r"^language_model\.(model\.)?", lambda match: inner[match[0]], name)
        name = re.sub(r"^visual\.", "model.visual.", name)
        if match := _ROUTED.fullmatch(name):
            return self._routed(tensors, match, rank)
        module, _, leaf = name.rpartition(".")
        head, _, last = module.rpartition(".")
        head = head.replace(".moe.share_expert", ".share_expert")  # vLLM moves it there
        parts = [f"{head}.{part}".strip(".") for part in self._merged.get(last, (last,))]
        return torch.cat(
            [_sliced(tensors[f"{part}.{leaf}".lstrip(".")], part, leaf, rank, self._columns) for part in parts]
        )

    def left_out(self, name: str) -> bool:
        """Whether a parameter is of an image encoder that this checkpoint has not."""
        module = name.partition(".")[0]
        return module in _ENCODERS and not any(f".{module}." in f".{stored}" for stored in self.tensors)

    def scale_of_parts(self, name: str, rank: Rank) -> torch.Tensor:
        """What a ``weight_scale`` must hold where an engine keeps one scale for each linear it merged or stacked."""
        rows = self.parameter(name, Rank(rank.size, rank.rank, True) if rank.expert_parallel else WHOLE)
        if match := _ROUTED.fullmatch(name):
            return (
                torch.stack([half[:, 0, 0] for half in rows.chunk(2, 1)], 1)
                if match["half"] == "w13"
                else rows[:, 0, 0]
            )
        head, _, last = name.removesuffix(".weight_scale").rpartition(".")
        return torch.stack([self.tensors[f"{head}.{part}.weight_scale"][0, 0] for part in MERGED.get(last, (last,))])

    def input_scale(self, name: str, rank: Rank) -> torch.Tensor:
        """What an ``input_scale`` must hold: one for each expert of the rank, or the one of all merged linears."""
        if match := _ROUTED_INPUT.fullmatch(name):
            leaf = {"w13": "gate_up_proj", "w2": "down_proj"}[match["half"]]
            scales = self.tensors[f"{match['experts']}.{leaf}_input_scale"]
            return torch.tensor_split(scales, rank.size)[rank.rank] if rank.expert_parallel else scales
        head, _, last = name.removesuffix(".input_scale").rpartition(".")
        [scale] = {float(self.tensors[f"{head}.{part}.input_scale"]) for part in MERGED.get(last, (last,))}
        return torch.tensor([scale])

    def is_int8(self, module: str) -> bool:
        """Whether the weight of an engine's module, or the experts that it holds, is int8."""
        leaf = "w13_weight" if module.endswith("experts") else "weight"
        return self.parameter(f"{module}.{leaf}", WHOLE).dtype == torch.int8

    def _routed(self, tensors: Tensors, match: re.Match[str], rank: Rank) -> torch.Tensor:
        half, scale = match["half"], match["leaf"] == "weight_scale"
        leaves = {"w13": ("gate_up_proj", "w13"), "w2": ("down_proj", "w2")}[half]
        names = [f"{match['experts']}.{leaf}{'_scale' if scale else ''}" for leaf in leaves]
        [tensor] = [tensors[name] for name in names if name in tensors]
        if rank.expert_parallel:
            return torch.tensor_split(tensor, rank.size)[rank.rank]  # the first get one more
        if half == "w13":
            [down] = [
                tensors[name] for leaf in ("down_proj", "w2") if (name := f"{match['experts']}.{leaf}") in tensors
            ]
            halves = tensor.chunk(tensor.shape[1] // down.shape[2], 1)  # one without a gate
            return torch.cat([rank.part(part, 1) for part in halves], 1)
        return tensor if scale else rank.part(tensor, 2)


def _sliced(tensor: torch.Tensor, module: str, leaf: str, rank: Rank, columns: Collection[str]) -> torch.Tensor:
    last = module.rpartition(".")[2]
    if last in columns:
        return rank.part(tensor, 0)
    if last in _ROW and leaf == "weight":
        return rank.part(tensor, 1)
    return tensor


def _stacked_float_experts(tensors: Tensors) -> Tensors:
    """Experts that were left in float, one by one, in the form of the others."""
    stacked: Tensors = {}
    for name in [name for name in tensors if re.search(r"\.experts\.0\.(gate_proj|w1)\.weight$", name)]:
        prefix, _, gate = name.removesuffix(".weight").rpartition(".0.")
        up, down, both, last = _FLOAT[gate]
        experts = range(sum(bool(re.fullmatch(rf"{re.escape(prefix)}\.\d+\.{gate}\.weight", key)) for key in tensors))
        if tensors[name].is_floating_point():
            gates, ups, downs = (
                [tensors[f"{prefix}.{expert}.{role}.weight"] for expert in experts] for role in (gate, up, down)
            )
            stacked[f"{prefix}.{both}"] = torch.cat([torch.stack(gates), torch.stack(ups)], 1)
            stacked[f"{prefix}.{last}"] = torch.stack(downs)
    return stacked


_FLOAT = {"gate_proj": ("up_proj", "down_proj", "gate_up_proj", "down_proj"), "w1": ("w3", "w2", "w13", "w2")}


def fill(folder: Path) -> Path:
    """Give the tensors of an export of which only the headers were kept random content; returns ``folder``."""
    random = torch.Generator().manual_seed(0)
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if any(tensor.any() for tensor in tensors.values() if tensor.dtype == torch.int8):
            continue
        for name, tensor in tensors.items():
            if name.endswith("_zero_point"):
                continue
            if tensor.dtype == torch.int8:
                tensor.copy_(torch.randint(-127, 128, tensor.shape, generator=random, dtype=torch.int8))
            else:
                values = torch.rand(tensor.shape, generator=random) + 0.5
                tensor.copy_(values * 1e-2 if name.endswith("_scale") else values)
        save_file(tensors, file)
    return folder
