"""Measure ``verify`` beside reading the files once with as many threads: wall time and memory.

    python benchmarks/verify.py [MODEL] [--shape qwen3] [--layers 14] [--tokens 64] [--rounds 3] [--devices 1,2]

Without MODEL one is made, by default of 14 layers of Qwen3-30B-A3B (10 GB), and converted to fused-int8. Before each
measurement the files are dropped from the page cache (posix_fadvise), as far as the system does that; both then read
from the disk. With ``--states cached`` they stay in the page cache. There is one process for each kind of measurement;
kinds alternate. A first run compiles the kernels and is not counted. Peak memory is counted beyond what the process
held when everything was imported and the devices were ready.

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
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any, Final

BLOCK: Final = 2 * 2**20
PART: Final = 64 * 2**20
LAYERS, BYTES, NUMBERS = "layers alone", "verify --bytes-only", "verify"

Found = dict[str, Any]


def read_once(folder: Path, *, cached: bool) -> Found:
    """Read all files with as many threads as verify has."""
    from quarkconv.load.layer_reader import READERS

    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    parts = [(path, start) for path in files for start in range(0, path.stat().st_size, PART)]
    drop(folder, cached=cached)
    started = time.perf_counter()
    with ThreadPoolExecutor(READERS) as pool:
        total = sum(pool.map(read_part, parts))
    return {"seconds": time.perf_counter() - started, "bytes": total, "threads": READERS}


def read_part(part: tuple[Path, int]) -> int:
    path, start = part
    buffer, done = bytearray(BLOCK), 0
    with open(path, "rb", buffering=0) as handle:
        while done < PART and (count := os.preadv(handle.fileno(), [buffer], start + done)):
            done += count
    return done


def drop(folder: Path, *, cached: bool) -> None:
    """Drop the files from the page cache, unless they are to stay there."""
    for path in folder.rglob("*"):
        if path.is_file() and not cached:
            with open(path, "rb") as handle:
                os.fsync(handle.fileno())
                os.posix_fadvise(handle.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def verify(model: Path, device: str, tokens: list[int], stages: tuple[str, ...]) -> Callable[[], Found]:
    """Prepare the devices; what is returned verifies, and gives seconds and memory."""
    import torch
    from common import peak_memory

    from quarkconv.description.description import describe
    from quarkconv.load.layer_reads import LayerPart
    from quarkconv.verify.verify import verify_checkpoint

    devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if device == "cuda" else []
    for name in devices or ["cpu"] * ("numbers" in stages):  # kernels compile, libraries of matrix products load
        verify_checkpoint(model, device=name, tokens=tokens, layers={0}, stages=("numbers",))
    layer_bytes = max(LayerPart(layer).nbytes for layer in describe(model).int8_layers)

    def run() -> Found:
        for index in range(len(devices)):
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(index)
        started = time.perf_counter()
        with peak_memory() as peaks:
            result = verify_checkpoint(model, device=device, tokens=tokens, stages=stages)
        assert result.numbers.skipped is None or "numbers" not in stages, result.numbers.skipped
        return {
            "seconds": time.perf_counter() - started,
            "ok": result.ok,
            "problems": [problem.message for problem in result.problems[:5]],
            "host_bytes": peaks[-1],
            "layer_bytes": layer_bytes,
            "device_bytes": [torch.cuda.max_memory_allocated(index) for index in range(len(devices))],
            "devices": result.numbers.device,
            "layer_seconds": [layer.seconds for layer in result.numbers.layers],
        }

    return run


def read_layers(model: Path) -> Callable[[], Found]:
    """What is returned reads the layers as they are read for numbers, with checksums."""
    from quarkconv.description.description import describe
    from quarkconv.load.arenas import ArenaPool
    from quarkconv.load.layer_reader import READERS, LayerReader
    from quarkconv.load.layer_reads import LayerPart, written_tensors
    from quarkconv.plan.manifest import read_manifest

    def from_the_disk() -> int:
        return int(Path("/proc/self/io").read_text().partition("\nread_bytes:")[2].split()[0])

    def run() -> Found:
        description, written = describe(model), written_tensors(read_manifest(model))
        parts = [LayerPart(layer) for layer in description.int8_layers]
        before, started = from_the_disk(), time.perf_counter()
        with (
            ThreadPoolExecutor(READERS) as pool,
            LayerReader(description, pool, written) as reader,
            ArenaPool(1, max(part.nbytes for part in parts)) as arenas,
        ):
            arena = arenas.take(1)
            wrong = [mismatch for part in parts for mismatch in reader.read(part, arena)[1]]
        return {
            "seconds": time.perf_counter() - started,
            "ok": not wrong,
            "bytes": sum(part.nbytes for part in parts),
            "from_the_disk": from_the_disk() - before,
        }

    return run


def measure(model: Path, kind: str, device: str, tokens: list[int]) -> None:
    """One process: prepare, then measure once for each line of the standard input, which is a state."""
    if kind == LAYERS:
        run = read_layers(model)
    else:
        run = verify(model, device, tokens, ("bytes",) if kind == BYTES else ("bytes", "numbers"))
    print("ready", flush=True)
    for state in sys.stdin:
        cached = state.strip() == "cached"
        read_once(model, cached=cached)  # so that both find the memory of a virtual machine in the same state
        once = read_once(model, cached=cached)
        drop(model, cached=cached)
        found = run()
        print(json.dumps(found | {"once": once, "over_reading": found["seconds"] / once["seconds"]}), flush=True)


class Kind:
    """A process that measures one thing, once for each :meth:`run`."""

    def __init__(self, kind: str, devices: int, options: argparse.Namespace, model: Path) -> None:
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, range(devices)))} if devices else {}
        words = (model, "--kind", kind, "--device", "cuda" if devices else "cpu", "--tokens", options.tokens)
        self._process = subprocess.Popen(
            [sys.executable, __file__, *map(str, words)],
            env={**os.environ, **visible},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self._lines = iter(self._process.stdout or ())

    def ready(self) -> None:
        """Wait until everything is imported and compiled."""
        if next(self._lines, None) is None:
            sys.exit("a process failed")

    def run(self, state: str) -> Found:
        """Measure once."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{state}\n")
        self._process.stdin.flush()
        line = next(self._lines, None)
        if line is None:
            sys.exit("a process failed")
        found: Found = json.loads(line)
        return found

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def make_model(shape: str, layers: int, folder: Path) -> Path:
    from common import MINIMAX_M2, QWEN3_30B, TINY
    from support.streaming import write_streamed

    from quarkconv import convert_checkpoint

    source = folder / "source"
    sizes = {"minimax": MINIMAX_M2, "qwen3": QWEN3_30B, "tiny": TINY}[shape]
    write_streamed(source, replace(sizes, layers=layers), data=True)
    return convert_checkpoint(source, "fused-int8", folder / "model").output


def median(runs: list[Found]) -> Found:
    """The medians of some runs."""
    return {
        "seconds": statistics.median(run["seconds"] for run in runs),
        "reading_once": statistics.median(run["once"]["seconds"] for run in runs),
        "over_reading": statistics.median(run["over_reading"] for run in runs),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path)
    parser.add_argument("--shape", default="qwen3", choices=("minimax", "qwen3", "tiny"))
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--tokens", default="64", help="several as 64,1024")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--devices", default="", help="numbers of GPUs; 0 for the CPU; empty for bytes alone")
    parser.add_argument("--states", default="cold", help="cold, cached or cached,cold: the page cache")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--kind", help=argparse.SUPPRESS)
    parser.add_argument("--device", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.kind:
        tokens = [int(count) for count in options.tokens.split(",")]
        measure(options.model, options.kind, options.device, tokens)
        return
    with tempfile.TemporaryDirectory() as temporary:
        model = options.model or make_model(options.shape, options.layers, Path(temporary))
        counts = [int(count) for count in options.devices.split(",") if count]
        kinds = {
            f"verify on {count} GPU" if count else "verify on the CPU": Kind(NUMBERS, count, options, model)
            for count in counts
        } or {kind: Kind(kind, 0, options, model) for kind in (LAYERS, BYTES)}
        for kind in kinds.values():
            kind.ready()
        result: Found = {"tokens": options.tokens, "summary": {}, "runs": {}}
        for state, number in product(options.states.split(","), range(options.rounds)):
            for name, kind in kinds.items():
                runs = result["runs"].setdefault(f"{name}, {state}", [])
                runs.append(kind.run(state))
                result["summary"][f"{name}, {state}"] = median(runs)
                if options.out:  # after each, so that a run that is cut short leaves what it measured
                    options.out.write_text(json.dumps(result) + "\n")
                print(f"{name}, {state}, round {number + 1}: {runs[-1]['seconds']:.2f} s", flush=True)
        for kind in kinds.values():
            kind.close()
    print(json.dumps(result["summary"], indent=1))


if __name__ == "__main__":
    main()
