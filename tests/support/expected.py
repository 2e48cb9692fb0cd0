"""What each target makes of a checkpoint: a few lines of torch for each rule."""

from __future__ import annotations

import re
from pathlib import Path

import torch

from support.checkpoints import Tensors, load
from support.moe_model import PROJECTIONS

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.(gate_proj|up_proj|down_proj|w[123])")
_STACKED = re.compile(r"(.+)\.(gate_proj|up_proj|down_proj|w[123])")
_ROLES = {
    name: role for names in PROJECTIONS.values() for role, name in zip(("gate", "up", "down"), names, strict=True)
}

COMPANIONS = (".weight_scale", ".weight_zero_point", ".input_scale", ".input_zero_point")
FLOAT_IN_ENGINES = (".eh_proj", ".shared_head.head")
"""Ends of the names of the int8 linears of these exports that engines keep in float: plain ``nn.Linear`` and heads."""
OF_ACTIVATIONS = (".input_scale", ".input_zero_point", ".output_scale", ".output_zero_point")


def fused_int8(source: Path) -> Tensors:
    """The tensors of fused-int8."""
    tensors = load(source)
    expected = dict(tensors)
    experts: dict[str, dict[tuple[str, int], str]] = {}
    pieces: Tensors = {}
    for name, weight in tensors.items():
        if not name.endswith(".weight") or weight.dtype != torch.int8:
            continue
        module = name.removesuffix(".weight")
        companions = (".weight", ".weight_scale", ".weight_zero_point", ".input_scale", ".input_zero_point")
        own = {end: expected.pop(module + end) for end in companions if module + end in tensors}
        scale = own[".weight_scale"].float()
        if match := _EXPERT.fullmatch(module):
            experts.setdefault(match[1], {})[_ROLES[match[3]], int(match[2])] = module
            _split(pieces, module, weight, scale, own.get(".input_scale"))
        elif weight.ndim == 3 and (match := _STACKED.fullmatch(module)):
            for expert in range(len(weight)):
                experts.setdefault(f"{match[1]}.experts", {})[_ROLES[match[2]], expert] = f"{module} {expert}"
                static = own[".input_scale"][expert] if ".input_scale" in own else None
                _split(pieces, f"{module} {expert}", weight[expert], scale[expert], static)
        elif module.endswith(FLOAT_IN_ENGINES):
            expected[name] = (weight.float() * scale.reshape(-1, 1)).bfloat16()
        else:
            expected[name] = weight
            expected[f"{name}_scale"] = scale.reshape(-1, 1).expand(len(weight), 1)
            if ".input_scale" in own:
                expected[f"{module}.input_scale"] = own[".input_scale"]
    for prefix, members in experts.items():
        by_w = next(iter(members.values())).split(" ")[0].rpartition(".")[2].startswith("w")
        both, last = ("w13", "w2") if by_w else ("gate_up_proj", "down_proj")
        rows = [role for role in ("gate", "up") if (role, 0) in members]  # some families have no gate
        count = len(members) // (len(rows) + 1)
        for end in ("", "_scale", "_input_scale"):
            if members["up", 0] + end not in pieces:
                continue
            parts = [[pieces[members[role, expert] + end] for role in rows] for expert in range(count)]
            halves = [part[0] if end == "_input_scale" else torch.cat(part) for part in parts]
            expected[f"{prefix}.{both}{end}"] = torch.stack(halves)
            expected[f"{prefix}.{last}{end}"] = torch.stack([pieces[members["down", e] + end] for e in range(count)])
    return with_engine_names(expected)


def with_engine_names(tensors: Tensors) -> Tensors:
    """Scales of the key-value cache under the names that vLLM's compressed-tensors path knows."""
    return {re.sub(r"\.([kv])_proj\.output_scale$", r".\1_scale", name): tensor for name, tensor in tensors.items()}


def _split(pieces: Tensors, name: str, weight: torch.Tensor, scale: torch.Tensor, static: torch.Tensor | None) -> None:
    pieces[name] = weight
    pieces[f"{name}_scale"] = scale.reshape(-1, 1).expand(len(weight), 1)
    if static is not None:
        pieces[f"{name}_input_scale"] = static.float().reshape(())


def expected_tensors(source: Tensors, target: str) -> Tensors:
    """The tensors of a target that keeps the model's names, from those of a Quark export."""
    expected = {
        name: tensor
        for name, tensor in source.items()
        if not (target == "bf16" and name.endswith(OF_ACTIVATIONS))
        and not (target == "w8a8-int8" and name.endswith("output_scale"))
    }
    for name, codes in source.items():
        module = name.removesuffix(".weight")
        if module == name or codes.dtype != torch.int8:
            continue
        for end in COMPANIONS:
            expected.pop(module + end, None)
        *lead, out, _ = codes.shape
        stored = source[f"{module}.weight_scale"].float()
        scale = stored.reshape(*lead, -1).expand(*lead, out)
        static = source.get(f"{module}.input_scale")
        if target == "bf16" or module.endswith(FLOAT_IN_ENGINES):
            expected[name] = (codes.float() * scale.unsqueeze(-1)).bfloat16()
            continue
        if static is not None:
            expected[f"{module}.input_scale"] = static.float()
        if target == "quark":
            expected[f"{module}.weight_scale"] = scale if static is None else scale[..., 0]
        else:
            expected[f"{module}.weight_scale"] = scale.unsqueeze(-1)
    return with_engine_names(expected) if target == "compressed-tensors" else expected


GATE_UP = ("experts.gate_up_proj", "experts.w13")
DOWN = ("experts.down_proj", "experts.w2")


def part_of(whole: Tensors, parallel: str, rank: int, world_size: int) -> Tensors:
    """The tensors of a rank: gate and up cut each by itself, down by its columns, or whole experts."""
    expected = {}
    for name, tensor in whole.items():
        kind = name.removesuffix("_input_scale").removesuffix("_scale")
        if not kind.endswith(GATE_UP + DOWN):
            expected[name] = tensor
        elif parallel == "ep":
            expected[name] = torch.tensor_split(tensor, world_size)[rank]
        elif name.endswith("_input_scale") or (name.endswith("_scale") and kind.endswith(DOWN)):
            expected[name] = tensor
        elif kind.endswith(DOWN):
            expected[name] = tensor.chunk(world_size, dim=2)[rank]
        else:
            halves = tensor.chunk(2, dim=1)
            expected[name] = torch.cat([half.chunk(world_size, dim=1)[rank] for half in halves], dim=1)
    return expected
