"""What the benchmarks share: checkpoints to work on, processes to time, results to keep."""

from __future__ import annotations

import json
import os
import platform
import random
import re
import statistics
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

SHARD_BYTES = 5 * 10**9
SIZES = {"I8": 1, "BF16": 2, "F32": 4}
_POOL_BYTES = 2**26

Kind = tuple[str, list[int]]


@dataclass(frozen=True, slots=True)
class Shape:
    """The sizes of a model: hidden H, intermediate I, experts E, attention rows, vocabulary."""

    hidden: int
    intermediate: int
    experts: int
    query: int
    key: int
    vocabulary: int


MINIMAX_M2 = Shape(hidden=3072, intermediate=1536, experts=256, query=6144, key=1024, vocabulary=200064)
QWEN3_30B = Shape(hidden=2048, intermediate=768, experts=128, query=4096, key=512, vocabulary=151936)
MANY_SMALL = Shape(hidden=2048, intermediate=64, experts=512, query=4096, key=512, vocabulary=1024)
TINY = Shape(hidden=64, intermediate=32, experts=256, query=64, key=64, vocabulary=1024)


def tensors(shape: Shape, layers: int) -> dict[str, Kind]:
    """Name -> dtype and shape, as a file-to-file export of a MiniMax-M2 has them."""
    found: dict[str, Kind] = {}

    def linear(name: str, rows: int, columns: int) -> None:
        found[f"{name}.weight"] = "I8", [rows, columns]
        found[f"{name}.weight_scale"] = "F32", [rows]

    hidden = shape.hidden
    attention = (
        ("q", shape.query, hidden),
        ("k", shape.key, hidden),
        ("v", shape.key, hidden),
        ("o", hidden, shape.query),
    )
    for name in ("model.embed_tokens", "lm_head"):
        found[f"{name}.weight"] = "BF16", [shape.vocabulary, hidden]
    found["model.norm.weight"] = "BF16", [hidden]
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        moe = f"{prefix}.block_sparse_moe"
        for name, rows, columns in attention:
            linear(f"{prefix}.self_attn.{name}_proj", rows, columns)
        found[f"{moe}.gate.weight"] = "BF16", [shape.experts, hidden]
        found[f"{moe}.e_score_correction_bias"] = "BF16", [shape.experts]
        for name in ("input_layernorm", "post_attention_layernorm"):
            found[f"{prefix}.{name}.weight"] = "BF16", [hidden]
        for expert in range(shape.experts):
            linear(f"{moe}.experts.{expert}.w1", shape.intermediate, hidden)
            linear(f"{moe}.experts.{expert}.w3", shape.intermediate, hidden)
            linear(f"{moe}.experts.{expert}.w2", hidden, shape.intermediate)
    return found


def nbytes(kind: Kind) -> int:
    """Size of a tensor."""
    size = SIZES[kind[0]]
    for dimension in kind[1]:
        size *= dimension
    return size


def write_checkpoint(folder: Path, shape: Shape, layers: int, *, data: bool, shard_bytes: int = SHARD_BYTES) -> int:
    """Write a checkpoint in Quark's ptpc_int8, its tensors spread over shards by name; returns their number.

    Without ``data`` the files have holes where it belongs: full size, and no space on the disk.
    """
    folder.mkdir(parents=True)
    found = tensors(shape, layers)
    shards: list[list[str]] = [[]]
    filled = 0
    for name in sorted(found):
        size = nbytes(found[name])
        if shards[-1] and filled + size > shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    rng = random.Random(0)
    pool = memoryview(rng.randbytes(_POOL_BYTES) if data else b"")
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
        text += b" " * (-len(text) % 8)
        with open(folder / file, "wb") as handle:
            handle.write(struct.pack("<Q", len(text)) + text)
            if not data:
                handle.truncate(8 + len(text) + position)
                continue
            for name in names:
                left = nbytes(found[name])
                if name.endswith("_scale"):  # random bytes may be NaN
                    handle.write(struct.pack("<f", 2.0**-7) * (left // 4))
                    continue
                while left:
                    start = rng.randrange(_POOL_BYTES // 2)
                    count = min(left, _POOL_BYTES - start)
                    handle.write(pool[start : start + count])
                    left -= count
    index = {"metadata": {"total_size": sum(map(nbytes, found.values()))}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps(_config(shape, layers)))
    return len(found)


def _config(shape: Shape, layers: int) -> dict[str, Any]:
    spec = {"dtype": "int8", "qscheme": "per_channel", "symmetric": True}
    gates = [f"model.layers.{layer}.block_sparse_moe.gate" for layer in range(layers)]
    quantization = {
        "quant_method": "quark",
        "version": "0.13",
        "exclude": ["lm_head", *gates],
        "layer_quant_config": {},
        "layer_type_quant_config": {},
        "export": {"weight_format": "real_quantized"},
        "global_quant_config": {
            "weight": {**spec, "ch_axis": 0, "is_dynamic": False},
            "input_tensors": {**spec, "ch_axis": 1, "is_dynamic": True},
        },
    }
    return {
        "model_type": "minimax_m2",
        "num_local_experts": shape.experts,
        "num_experts_per_tok": 8,
        "num_hidden_layers": layers,
        "quantization_config": quantization,
    }


class Sample(NamedTuple):
    """What a process took: wall and processor seconds, peak memory in bytes."""

    wall: float
    cpu: float
    peak: int


def measure(command: Sequence[str | Path]) -> Sample:
    """Run a process to its end, in silence."""
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL)
    peaks = [0]
    ended = threading.Event()
    watcher = threading.Thread(target=_watch, args=(process.pid, peaks, ended))
    watcher.start()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - started
    ended.set()
    watcher.join()
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        sys.exit(f"failed with {process.returncode}: {' '.join(map(str, command))}")
    return Sample(wall, usage.ru_utime + usage.ru_stime, max(peaks))


def _watch(process: int, peaks: list[int], ended: threading.Event) -> None:
    """Note the peak memory of a process and its children until it has ended.

    The kernel's own figure for a process that has ended would count what this one had when it started it.
    """
    while not ended.wait(0.02):
        with suppress(OSError):
            children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
            for number in (process, *children):
                status = Path(f"/proc/{number}/status").read_text()
                found = re.search(r"VmHWM:\s*(\d+) kB", status)
                peaks.append(int(found[1]) * 1024 if found else 0)


def row(name: str, samples: Sequence[Sample], beside: Sequence[Sample]) -> dict[str, Any]:
    """Medians of a command, and of its ratios to the command that it was run beside, round by round."""
    wall, cpu, peak = (statistics.median(column) for column in zip(*samples, strict=True))
    ratios = [own.wall / other.wall for own, other in zip(samples, beside, strict=False)]
    cpu_ratios = [own.cpu / other.cpu for own, other in zip(samples, beside, strict=False)]
    return {
        "command": name,
        "rounds": len(samples),
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "peak_bytes": int(peak),
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in ratios],
        "cpu_ratio": round(statistics.median(cpu_ratios), 3),
    }


def show(title: str, rows: Iterable[dict[str, Any]], unit: str) -> None:
    """Print rows as a table; ``unit`` is what the ratios are to."""
    print(f"\n{title}\n{'':44} {'wall s':>8} {'cpu s':>8} {'peak MB':>8} {'x ' + unit:>8}")
    for item in rows:
        times = f"{item['wall_s']:8.2f} {item['cpu_s']:8.2f} {item['peak_bytes'] / 1e6:8.0f} {item['ratio']:8.2f}"
        print(f"{item['command']:44} {times}", flush=True)


def save(name: str, result: dict[str, Any], *, merge: bool = False) -> None:
    """Keep a result in benchmarks/results, with when, where and of what it was measured.

    With ``merge`` its parts, which are objects, replace those of an earlier run; each says where it is from.
    """
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    about = {
        "date": datetime.now(UTC).date().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, Linux {platform.release()}",
        "python": platform.python_version(),
        "commit": commit.stdout.strip(),
    }
    path = Path(__file__).parent / "results" / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    if merge:
        earlier = json.loads(path.read_text()) if path.exists() else {}
        whole = {**earlier, **{part: {**about, **found} for part, found in result.items()}}
    else:
        whole = {"benchmark": name, **about, **result}
    path.write_text(json.dumps(whole, indent=1) + "\n")
