"""The same conversion as a script of a few lines does it: stack the experts of a layer with torch, save a file a layer.

Usage: python torch_stack.py SOURCE OUT
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

PARTS = {"w13": ("w1", "w3"), "w2": ("w2",)}


def main(source: Path, out: Path) -> None:
    """Convert, holding one layer in memory at a time."""
    out.mkdir()
    weight_map = json.loads((source / "model.safetensors.index.json").read_text())["weight_map"]
    files = {file: safe_open(source / file, "pt") for file in set(weight_map.values())}

    def get(name: str) -> torch.Tensor:
        return files[weight_map[name]].get_tensor(name)

    experts = re.compile(r"(.+\.experts)\.(\d+)\.")
    prefixes = sorted({match[1] for name in weight_map if (match := experts.match(name))})
    for number, prefix in enumerate(prefixes):
        count = 1 + max(int(match[2]) for name in weight_map if (match := experts.match(name)) and match[1] == prefix)
        layer = {}
        for leaf, parts in PARTS.items():
            rows = [torch.cat([get(f"{prefix}.{e}.{part}.weight") for part in parts]) for e in range(count)]
            layer[f"{prefix}.{leaf}"] = torch.stack(rows)
            scales = [torch.cat([get(f"{prefix}.{e}.{part}.weight_scale") for part in parts]) for e in range(count)]
            layer[f"{prefix}.{leaf}_scale"] = torch.stack(scales).unsqueeze(-1)
        save_file(layer, out / f"experts-{number:05d}.safetensors")
    save_file({name: get(name) for name in weight_map if not experts.match(name)}, out / "others.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
