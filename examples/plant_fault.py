"""Plant a fault that every loader accepts: shift the scales or the codes of one expert by a row.

    python plant_fault.py {scales,codes} CHECKPOINT OUT [--layer N] [--expert N]

CHECKPOINT is a `fused-int8` output of `quarkconv convert`. Names, shapes, dtypes and the set of values stay the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

SUFFIXES = {"scales": "_scale", "codes": ""}


def shift_rows(what: str, checkpoint: Path, out: Path, layer: int, expert: int) -> list[str]:
    """Copy a checkpoint and move each row of one expert's tensors down by one; the last row becomes the first.

    Returns:
        The names of the tensors that were changed.

    Raises:
        SystemExit: the checkpoint has no fused experts in that layer.
    """
    shutil.copytree(checkpoint, out)
    names = [f"model.layers.{layer}.mlp.experts.{leaf}{SUFFIXES[what]}" for leaf in ("gate_up_proj", "down_proj")]
    changed = [name for file in sorted(out.glob("*.safetensors")) for name in names if _shift(file, name, expert)]
    if not changed:
        raise SystemExit(f"{checkpoint} has no fused experts in layer {layer}")
    return changed


def _shift(file: Path, name: str, expert: int) -> bool:
    """Shift the rows of one expert of a tensor [experts, rows, ...] in its file; False if the file lacks the tensor."""
    with file.open("r+b") as handle:
        length = int.from_bytes(handle.read(8), "little")
        entry = json.loads(handle.read(length)).get(name)
        if entry is None:
            return False
        experts, rows = entry["shape"][:2]
        begin, end = entry["data_offsets"]
        size = (end - begin) // experts
        row = size // rows
        handle.seek(8 + length + begin + expert * size)
        data = handle.read(size)
        handle.seek(8 + length + begin + expert * size)
        handle.write(data[-row:] + data[:-row])
    return True


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=SUFFIXES)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--layer", type=int, default=0)
    parser.add_argument("--expert", type=int, default=0)
    options = parser.parse_args()
    for name in shift_rows(options.what, options.checkpoint, options.out, options.layer, options.expert):
        print(f"shifted by a row: {name}, expert {options.expert}")


if __name__ == "__main__":
    main()
