"""Measure ``verify`` beside reading the files once with as many threads: wall time and memory.

    python benchmarks/verify.py [MODEL] [--shape qwen3] [--layers 14] [--tokens 64] [--rounds 3] [--devices 1,2]

Without MODEL one is made, by default of 14 layers of Qwen3-30B-A3B (10 GB), and converted to fused-int8. Before each
measurement the files are dropped from the page cache (posix_fadvise), as far as the system does that; both then read
from the disk. A first run compiles the kernels and is not counted. Every measurement is a process of its own; its peak
memory is counted beyond what it held when everything was imported and the devices were ready.

Without ``--devices`` no numbers are computed: bytes alone are verified, and the layers are read as they are for
numbers, checksums included, to see what that takes and how much of it comes from the disk.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

READ = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from quarkconv.verify.streaming import READERS
files = [os.path.join(folder, name) for folder, _, names in os.walk(sys.argv[1]) for name in names]
BLOCK, PART = 2 * 2**20, 64 * 2**20
def drop(path):
    descriptor = os.open(path, os.O_RDONLY); os.fsync(descriptor)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED); os.close(descriptor)
def read(part):
    path, start = part
    descriptor = os.open(path, os.O_RDONLY); buffer = bytearray(BLOCK); done = 0
    while done < PART:
        count = os.preadv(descriptor, [buffer], start + done)
        done += count
        if count == 0: break
    os.close(descriptor)
for path in files: drop(path)
parts = [(path, start) for path in files for start in range(0, os.path.getsize(path), PART)]
started = time.perf_counter()
with ThreadPoolExecutor(READERS) as pool: list(pool.map(read, parts))
seconds = time.perf_counter() - started
print(json.dumps({"seconds": seconds, "bytes": sum(map(os.path.getsize, files)), "threads": READERS}))
"""

VERIFY = """
import json, os, resource, sys, time
import torch
from quarkconv.verify.verify import verify_checkpoint
from quarkconv.load.layer_reads import LayerPart
from quarkconv.description.description import describe
from pathlib import Path
model, device, tokens, stages = sys.argv[1:5]
tokens, stages = [int(count) for count in tokens.split(",")], stages.split(",")
cuda = device == "cuda"
if cuda:
    for index in range(torch.cuda.device_count()): torch.zeros(1, device=f"cuda:{index}")
    for index in range(torch.cuda.device_count()):  # kernels compile, the libraries of matrix products load
        verify_checkpoint(model, device=f"cuda:{index}", tokens=tokens, layers={0}, stages=("numbers",))
        torch.cuda.empty_cache(); torch.cuda.reset_peak_memory_stats(index)
def drop(path):
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED); os.close(descriptor)
for path in Path(model).rglob("*"):
    if path.is_file(): drop(path)
def resident():
    return int(open("/proc/self/statm").read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
import threading
before, peak, stop = resident(), [0], threading.Event()
def watch():
    while not stop.wait(0.02): peak[0] = max(peak[0], resident())
watcher = threading.Thread(target=watch); watcher.start()
started = time.perf_counter()
result = verify_checkpoint(model, device=device, tokens=tokens, stages=stages)
seconds = time.perf_counter() - started
stop.set(); watcher.join()
layer = max(LayerPart(layer).nbytes for layer in describe(Path(model)).int8_layers)
print(json.dumps({"seconds": seconds, "ok": result.ok,
    "problems": [problem.message for problem in result.problems[:5]],
    "host_bytes": peak[0] - before, "layer_bytes": layer,
    "device_bytes": [torch.cuda.max_memory_allocated(i) for i in range(torch.cuda.device_count())] if cuda else [],
    "devices": result.numbers.device, "layer_seconds": [layer.seconds for layer in result.numbers.layers]}))
"""


LAYERS = """
import json, os, sys, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from quarkconv.description.description import describe
from quarkconv.plan.manifest import read_manifest
from quarkconv.load.arenas import ArenaPool
from quarkconv.load.layer_reader import READERS, LayerReader
from quarkconv.load.layer_reads import LayerPart, written_tensors
root = Path(sys.argv[1]); description = describe(root); written = written_tensors(read_manifest(root))
layers = description.int8_layers; size = max(LayerPart(layer).nbytes for layer in layers)
for path in root.iterdir():
    descriptor = os.open(path, os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED); os.close(descriptor)
def from_the_disk():
    return int(next(line for line in open("/proc/self/io") if line.startswith("read_bytes")).split()[1])
before = from_the_disk(); started = time.perf_counter()
with (ThreadPoolExecutor(READERS) as pool, LayerReader(description, pool, written) as reader,
      ArenaPool(1, size) as arenas):
    problems = []; arena = arenas.take(1)
    for layer in layers: reader.read(LayerPart(layer), arena)
print(json.dumps({"seconds": time.perf_counter() - started, "ok": not problems,
    "bytes": sum(LayerPart(layer).nbytes for layer in layers), "from_the_disk": from_the_disk() - before}))
"""


def child(code: str, *words: str, devices: int | None = None) -> dict[str, Any]:
    env = dict(os.environ)
    if devices is not None:
        env["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(devices)))
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, env=env)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def make_model(shape: str, layers: int, folder: Path) -> Path:
    from common import MINIMAX_M2, QWEN3_30B, TINY
    from support.streaming import write_streamed

    from quarkconv import convert_checkpoint

    source = folder / "source"
    sizes = {"minimax": MINIMAX_M2, "qwen3": QWEN3_30B, "tiny": TINY}[shape]
    # A router of noise favours a few experts; a model type without a known router has its tokens dealt out evenly.
    write_streamed(source, replace(sizes, layers=layers, model_type="random"), data=True)
    return convert_checkpoint(source, "fused-int8", folder / "model").output


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?")
    parser.add_argument("--shape", default="qwen3", choices=("minimax", "qwen3", "tiny"))
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--tokens", default="64")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", default="", help="numbers of GPUs to measure; empty for bytes alone, on the CPU")
    parser.add_argument("--out")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model or str(make_model(options.shape, options.layers, Path(temporary)))
        devices = [int(count) for count in options.devices.split(",") if count]
        kinds: dict[str, tuple[tuple[str, ...], int | None]] = {
            f"verify on {count} GPU": ((VERIFY, model, "cuda", options.tokens, "bytes,numbers"), count)
            for count in devices
        }
        if not devices:
            kinds = {
                "layers alone": ((LAYERS, model), None),
                "verify --bytes-only": ((VERIFY, model, "cpu", options.tokens, "bytes"), None),
            }
        runs: dict[str, list[dict[str, Any]]] = {kind: [] for kind in kinds}
        for _ in range(options.rounds):
            for kind, (words, count) in kinds.items():
                child(READ, model)  # so that both find the memory of a virtual machine in the same state
                once = child(READ, model)
                found = child(*words, devices=count)
                runs[kind].append(found | {"once": once, "over_reading": found["seconds"] / once["seconds"]})
    summary = {
        kind: {
            "seconds": statistics.median(run["seconds"] for run in found),
            "reading_once": statistics.median(run["once"]["seconds"] for run in found),
            "over_reading": statistics.median(run["over_reading"] for run in found),
        }
        for kind, found in runs.items()
    }
    result = {"tokens": options.tokens, "summary": summary, "runs": runs}
    print(json.dumps(result["summary"], indent=1))
    if options.out:
        Path(options.out).write_text(json.dumps(result) + "\n")


if __name__ == "__main__":
    main()
