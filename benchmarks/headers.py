"""How long `inspect` and `convert --dry-run` take on a 230 GB checkpoint, beside reading its headers with json alone.

The checkpoint has the names, dtypes, shapes and shards of MiniMax-M2 in ptpc_int8: 62 layers of 256 experts, 96,000
tensors, 47 shards, and holes for data, so that it takes no disk. Each row is a fresh process; the rows alternate, and
what counts is the median of the ratios, since a machine's speed drifts.

Usage: python benchmarks/headers.py [--layers 62] [--rounds 7]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import struct
import subprocess
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path

HIDDEN, INTERMEDIATE, EXPERTS, VOCABULARY = 3072, 1536, 256, 200064
SHARD_BYTES = 5 * 10**9
SIZES = {"I8": 1, "BF16": 2, "F32": 4}

JSON_ALONE = """
import glob, json, struct, sys
for path in sorted(glob.glob(sys.argv[1] + "/*.safetensors")):
    with open(path, "rb") as file:
        json.loads(file.read(struct.unpack("<Q", file.read(8))[0]))
"""


def tensors(layers: int) -> dict[str, tuple[str, list[int]]]:
    """Name -> dtype and shape, as a file-to-file export has them."""
    found: dict[str, tuple[str, list[int]]] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = "I8", [rows, columns]
        found[f"{name}.weight_scale"] = "F32", [rows]

    for name in ("model.embed_tokens", "lm_head"):
        found[f"{name}.weight"] = "BF16", [VOCABULARY, HIDDEN]
    found["model.norm.weight"] = "BF16", [HIDDEN]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        moe = f"{prefix}.block_sparse_moe"
        for name, rows, columns in (("q", 6144, HIDDEN), ("k", 1024, HIDDEN), ("v", 1024, HIDDEN), ("o", HIDDEN, 6144)):
            linear(f"{prefix}.self_attn.{name}_proj", rows, columns)
        found[f"{moe}.gate.weight"] = "BF16", [EXPERTS, HIDDEN]
        found[f"{moe}.e_score_correction_bias"] = "BF16", [EXPERTS]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{name}.weight"] = "BF16", [HIDDEN]
        for expert in range(EXPERTS):
            linear(f"{moe}.experts.{expert}.w1", INTERMEDIATE, HIDDEN)
            linear(f"{moe}.experts.{expert}.w3", INTERMEDIATE, HIDDEN)
            linear(f"{moe}.experts.{expert}.w2", HIDDEN, INTERMEDIATE)
    return found


def nbytes(kind: tuple[str, list[int]]) -> int:
    """Size of a tensor."""
    size = SIZES[kind[0]]
    for dimension in kind[1]:
        size *= dimension
    return size


def write_checkpoint(folder: Path, layers: int) -> int:
    """Write headers, index and config; the data is holes. Returns the number of tensors."""
    found = tensors(layers)
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(found):
        size = nbytes(found[name])
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    weight_map = {}
    for number, names in enumerate(shards, start=1):
        file = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        header, position = {}, 0
        for name in names:
            end = position + nbytes(found[name])
            header[name] = {"dtype": found[name][0], "shape": found[name][1], "data_offsets": [position, end]}
            position = end
            weight_map[name] = file
        text = json.dumps(header, separators=(",", ":")).encode()
        with open(folder / file, "wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            handle.truncate(8 + len(text) + position)
    total = sum(map(nbytes, found.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    spec = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True}
    exclude = ["lm_head", *(f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(layers))]
    quantization = {
        "quant_method": "quark",
        "version": "0.13",
        "exclude": exclude,
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "export": {"weight_format": "real_quantized"},
        "global_quant_config": {
            "weight": {**spec, "ch_axis": 0, "is_dynamic": False},
            "input_tensors": {**spec, "ch_axis": 1, "is_dynamic": True},
        },
    }
    config = {
        "model_type": "minimax_m2",
        "num_local_experts": EXPERTS,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "quantization_config": quantization,
    }
    (folder / "config.json").write_text(json.dumps(config))
    return len(found)


def run(command: list[str]) -> tuple[float, float, int]:
    """Wall seconds, processor seconds and peak memory in bytes of a process."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"{command} failed")
    return wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * 1024


def main() -> None:
    """Measure, print a table, and save it in benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=62)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary) / "model"
        folder.mkdir()
        count = write_checkpoint(folder, options.layers)
        commands = {
            "json.loads of the headers": [sys.executable, "-c", JSON_ALONE, str(folder)],
            "quarkconv inspect --json": ["quarkconv", "inspect", str(folder), "--json"],
            "quarkconv convert --dry-run": ["quarkconv", "convert", str(folder), "--to", "fused-int8", "--dry-run"],
        }
        for command in commands.values():
            run(command)
        rounds = [{name: run(command) for name, command in commands.items()} for _ in range(options.rounds)]
    first = next(iter(commands))
    rows = []
    print(f"{count:,} tensors, {options.layers} layers; medians of {options.rounds} rounds")
    print(f"{'':30} {'wall s':>8} {'cpu s':>8} {'peak MB':>8} {'x json':>8}")
    for name in commands:
        wall, cpu, peak = (statistics.median(row[name][column] for row in rounds) for column in range(3))
        ratio = statistics.median(row[name][0] / row[first][0] for row in rounds)
        rows.append({"command": name, "wall_s": wall, "cpu_s": cpu, "peak_bytes": peak, "ratio": ratio})
        print(f"{name:30} {wall:8.3f} {cpu:8.3f} {peak / 1e6:8.0f} {ratio:8.2f}")
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    result = {
        "benchmark": "headers",
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}",
        "commit": commit.stdout.strip(),
        "layers": options.layers,
        "tensors": count,
        "rounds": options.rounds,
        "rows": rows,
    }
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    (results / "headers.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
