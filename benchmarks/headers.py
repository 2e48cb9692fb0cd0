"""How long `inspect` and `convert --dry-run` take on a 230 GB checkpoint, beside reading its headers with json alone.

The checkpoint has the names, dtypes, shapes and shards of MiniMax-M2 in ptpc_int8: 62 layers of 256 experts, 96,000
tensors, 47 shards, and holes for data, so that it takes no disk. Each row is a fresh process; the rows alternate, and
what counts is the median of the ratios, since a machine's speed drifts.

Usage: python benchmarks/headers.py [--layers 62] [--rounds 7]
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from common import MINIMAX_M2, measure, row, save, show
from support.streaming import write_streamed

JSON_ALONE = """
import glob, json, struct, sys
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with open(path, "rb") as file:
        json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
"""


def main() -> None:
    """Measure, print a table, and save it in benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        count = write_streamed(folder, replace(MINIMAX_M2, layers=options.layers), data=False)
        commands = {
            "json.loads of the headers": [sys.executable, "-c", JSON_ALONE, folder],
            "quarkconv inspect --json": ["quarkconv", "inspect", folder, "--json"],
            "quarkconv convert --dry-run": ["quarkconv", "convert", folder, "--to", "fused-int8", "--dry-run"],
        }
        for command in commands.values():
            measure(command)
        rounds = [{name: measure(command) for name, command in commands.items()} for _ in range(options.rounds)]
    beside = [samples["json.loads of the headers"] for samples in rounds]
    rows = [row(name, [samples[name] for samples in rounds], beside) for name in commands]
    show(f"{count:,} tensors, {options.layers} layers; medians of {options.rounds} rounds", rows, "json")
    save("headers", {"layers": options.layers, "tensors": count, "rounds": options.rounds, "rows": rows})


if __name__ == "__main__":
    main()
