"""The experts of a layer, read with safetensors' own loader and stacked with torch: what the layer reader must give."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open

from quarkconv.experts.layer import MoELayer

Stacked = dict[str, torch.Tensor | None]


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint."""
    found: dict[str, torch.Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            found |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    return found


def stacked_experts(folder: Path, layer: MoELayer) -> Stacked:
    """The fields of ``FusedExperts`` of one layer."""
    stored = all_tensors(folder)
    gate, up, down = layer.naming.projections()

    def stack(leaf: str, suffix: str) -> torch.Tensor | None:
        if layer.layout == "stacked":
            return stored.get(f"{layer.moe}.{leaf}.{suffix}")
        names = [f"{layer.prefix}.{expert}.{leaf}.{suffix}" for expert in range(layer.experts)]
        return torch.stack([stored[name] for name in names]) if names[0] in stored else None

    def rows(scale: torch.Tensor | None, count: int) -> torch.Tensor:
        assert scale is not None
        return scale.float().reshape(layer.experts, -1, 1).expand(layer.experts, count, 1)

    if layer.layout == "fused":
        both, last = (f"{layer.prefix}.{leaf}" for leaf in (layer.naming.fused_gate_up, layer.naming.fused_down))
        inputs = [stored.get(f"{name}_input_scale") for name in (both, last)]
        w13, w2 = stored[both], stored[last]
        w13_scale = rows(stored[f"{both}_scale"], w13.shape[1])
        w2_scale = rows(stored[f"{last}_scale"], w2.shape[1])
    else:
        parts, w2_codes = [stack(leaf, "weight") for leaf in (gate, up)], stack(down, "weight")
        assert parts[0] is not None
        assert parts[1] is not None
        assert w2_codes is not None
        w13, w2 = torch.cat([parts[0], parts[1]], dim=1), w2_codes
        scales = [rows(stack(leaf, "weight_scale"), layer.intermediate) for leaf in (gate, up)]
        w13_scale, w2_scale = torch.cat(scales, dim=1), rows(stack(down, "weight_scale"), layer.hidden)
        inputs = [stack(gate, "input_scale"), stack(down, "input_scale")]
    input_scales = [None if scale is None else scale.float().reshape(layer.experts) for scale in inputs]
    return {"w13": w13, "w13_scale": w13_scale, "w2": w2, "w2_scale": w2_scale,
            "w13_input_scale": input_scales[0], "w2_input_scale": input_scales[1]}  # fmt: skip
