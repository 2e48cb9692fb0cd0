"""What a conversion costs beside `cp -r`, and beside other ways to convert.

A conversion moves every byte once, so copying is what it is measured against: same source, same disk, alternating,
and the median of the ratios counts, since a machine's speed drifts. cp leaves its output in the page cache; quarkconv
has it on the disk, checksums included, when it returns. Before each run the output of the last one is deleted and the
disk is quiet.

    cp          9.8 GB of MiniMax-M2 (2 layers), page cache warm: cp, quarkconv and dd in turn, and nothing else
    main        the same: threads, checksums, other tools
                and again with a cold page cache (needs root, to drop it)
    quantize    4 layers of Qwen3-30B-A3B in BF16: --quantize all, beside copying the same source
    layers      Qwen3-30B-A3B, 1 to 8 layers: time must grow with the bytes
    small       512 experts of intermediate size 64: many small tensors
    checksums   how fast checksums are on a buffer in memory
    pieces      9,000 and 95,000 pieces in one file, those of 6 and 62 layers: what a piece costs in time and memory

Usage: python benchmarks/convert.py [--only main,cold] [--rounds 3] [--folder DIR]
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import os
import random
import shutil
import statistics
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from multiprocessing import Process
from pathlib import Path
from typing import Any

import xxhash
from common import (
    MANY_SMALL,
    MINIMAX_M2,
    QWEN3_30B,
    TINY,
    Sample,
    measure,
    row,
    save,
    show,
)
from support.moe_model import MoeModel
from support.streaming import write_streamed

ALTERNATIVES = Path(__file__).parent / "alternatives"
WITHOUT_CHECKSUMS = """
import sys, types
import quarkconv.write.shard_writer as shard_writer
from quarkconv.cli.main import run

class Nothing:
    def update(self, data): pass
    def hexdigest(self): return "0" * 32

shard_writer.xxhash = types.SimpleNamespace(xxh3_128=Nothing, xxh3_128_hexdigest=lambda data: "0" * 32)
run()
"""

Command = Callable[[Path, Path], list[str | Path]]


def cp(source: Path, out: Path) -> list[str | Path]:
    """Copying."""
    return ["cp", "-r", source, out]


def cp_and_sync(source: Path, out: Path) -> list[str | Path]:
    """Copying, and having it on the disk, as quarkconv has."""
    return ["sh", "-c", 'cp -r "$0" "$1" && sync -f "$1"', source, out]


def quarkconv(source: Path, out: Path, *words: str, to: str = "fused-int8") -> list[str | Path]:
    """Converting."""
    return ["quarkconv", "convert", source, "--to", to, "--out", out, *words]


def without_checksums(source: Path, out: Path) -> list[str | Path]:
    """Converting with the checksums left out, to see what they cost."""
    return [sys.executable, "-c", WITHOUT_CHECKSUMS, *quarkconv(source, out)[1:]]


def zeros(size: int, _source: Path, out: Path) -> list[str | Path]:
    """Writing as many bytes of nothing, past the page cache: what the disk takes."""
    words = f'mkdir "$0" && dd if=/dev/zero of="$0/zeros" bs=8M count={size >> 23} oflag=direct conv=fsync status=none'
    return ["sh", "-c", words, out]


def script(name: str, source: Path, out: Path) -> list[str | Path]:
    """Another way to convert."""
    return [sys.executable, ALTERNATIVES / name, source, out]


COPIES: Mapping[str, Command] = {"cp -r": cp, "cp -r, sync": cp_and_sync}


class Bench:
    """Runs commands on a source in turn, each into a fresh output."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder = folder
        self.rounds = rounds
        self.result: dict[str, dict[str, Any]] = {}

    def source(self, name: str, model: MoeModel, **options: Any) -> tuple[Path, int]:
        """A checkpoint and its size in bytes; read once, so that it is in the page cache as far as that can hold it."""
        source = self.folder / name
        # In a process of its own: what this one holds would count as the memory of those that it starts.
        writer = Process(target=write_streamed, args=(source, model), kwargs={"data": True, **options})
        writer.start()
        writer.join()
        for file in source.iterdir():
            with open(file, "rb", buffering=0) as handle:
                while handle.read(2**24):
                    pass
        return source, sum(file.stat().st_size for file in source.iterdir())

    def run(self, source: Path, command: Command, *, cold: bool = False) -> Sample:
        """One run."""
        out = self.folder / "out"
        os.sync()
        if cold:
            Path("/proc/sys/vm/drop_caches").write_text("3")
        sample = measure(command(source, out))
        shutil.rmtree(out)
        return sample

    def compare(
        self, source: Path, commands: Mapping[str, Command], *, rounds: int | None = None, cold: bool = False
    ) -> list[dict[str, Any]]:
        """Rows of all commands, the first of which is what the others are compared with."""
        samples: dict[str, list[Sample]] = {name: [] for name in commands}
        for _ in range(rounds or self.rounds):
            for name, command in commands.items():
                samples[name].append(self.run(source, command, cold=cold))
        beside = next(iter(samples.values()))
        return [row(name, found, beside) for name, found in samples.items()]

    def cp(self) -> None:
        """The figure that counts: nothing between the two but what the disk can do alone."""
        source, size = self.source("cp", replace(MINIMAX_M2, layers=2))
        commands: dict[str, Command] = {"cp -r": cp, "quarkconv": quarkconv, "dd, direct, zeros": partial(zeros, size)}
        rows = self.compare(source, commands)
        show(f"{size / 1e9:.1f} GB, MiniMax-M2, 2 layers, page cache warm", rows, "cp")
        self.result["cp"] = {"bytes": size, "rounds": self.rounds, "rows": rows}
        shutil.rmtree(source)

    def main(self) -> None:
        """Threads, checksums, and other tools."""
        source, size = self.source("main", replace(MINIMAX_M2, layers=2))
        title = f"{size / 1e9:.1f} GB, MiniMax-M2, 2 layers, page cache warm"
        rows = self.compare(
            source,
            {
                **COPIES,
                "quarkconv": quarkconv,
                "quarkconv --jobs 1": partial(_with_jobs, 1),
                "quarkconv --jobs 2": partial(_with_jobs, 2),
                "quarkconv without checksums": without_checksums,
            },
            rounds=self.rounds + 2,
        )
        others: dict[str, Command] = {"cp -r": cp, "torch.stack, save_file": partial(script, "torch_stack.py")}
        if importlib.util.find_spec("compressed_tensors"):
            name = "compressed-tensors convert_checkpoint"
            others[name] = partial(script, "compressed_tensors_convert.py")
        else:
            print("compressed-tensors is not installed: left out (pip install '.[bench]')")
        beside = self.compare(source, others, rounds=1)
        show(title, [*rows, *beside[1:]], "cp")
        self.result["main"] = {"bytes": size, "rounds": self.rounds + 2, "rows": rows, "others": beside}
        if os.geteuid() == 0:
            cold = self.compare(source, {**COPIES, "quarkconv": quarkconv}, cold=True)
            show("the same, page cache cold", cold, "cp")
            self.result["cold"] = {"bytes": size, "rounds": self.rounds, "rows": cold}
        shutil.rmtree(source)

    def targets(self) -> None:
        """The other targets, and experts divided among ranks, beside fused-int8."""
        source, size = self.source("targets", replace(MINIMAX_M2, vocabulary=1024))  # nearly all of it experts
        commands: dict[str, Command] = {
            f"--to {to}": partial(quarkconv, to=to)
            for to in ("fused-int8", "compressed-tensors", "w8a8-int8", "quark", "bf16")
        }
        for way in ("--tp", "--ep"):
            commands[f"--to fused-int8 {way} 8"] = partial(_by_rank, way)
        rows = self.compare(source, commands)
        show(f"{size / 1e9:.1f} GB, a layer of MiniMax-M2, page cache warm", rows, "--to fused-int8")
        self.result["targets"] = {"bytes": size, "rounds": self.rounds, "rows": rows}
        shutil.rmtree(source)

    def quantize(self) -> None:
        """Float experts quantized on the way, beside copying the same source."""
        int8, _ = self.source("int8", replace(QWEN3_30B, layers=4, vocabulary=1024))  # nearly all of it experts
        source = self.folder / "quantize"
        measure(quarkconv(int8, source, to="bf16"))
        shutil.rmtree(int8)
        size = sum(file.stat().st_size for file in source.iterdir())
        commands: dict[str, Command] = {
            "cp -r, sync": cp_and_sync,
            "cp -r": cp,
            **{f"--quantize all --to {to}": partial(_quantizing, to) for to in ("fused-int8", "compressed-tensors")},
        }
        rows = self.compare(source, commands)
        show(f"{size / 1e9:.1f} GB of BF16, 4 layers of Qwen3-30B-A3B, page cache warm", rows, "cp, sync")
        self.result["quantize"] = {"bytes": size, "rounds": self.rounds, "rows": rows}
        shutil.rmtree(source)

    def layers(self) -> None:
        """Time must grow with the bytes."""
        found = []
        for layers in (1, 2, 4, 8):
            source, size = self.source("layers", replace(QWEN3_30B, layers=layers))
            rows = self.compare(source, {**COPIES, "quarkconv": quarkconv})
            found.append({"layers": layers, "bytes": size, "rows": rows})
            show(f"{size / 1e9:.2f} GB, Qwen3-30B-A3B, {layers} layers", rows, "cp")
            shutil.rmtree(source)
        self.result["layers"] = {"rounds": self.rounds, "sizes": found}

    def small(self) -> None:
        """Many small tensors."""
        source, size = self.source("small", replace(MANY_SMALL, layers=12))
        rows = self.compare(source, {**COPIES, "quarkconv": quarkconv})
        show(f"{size / 1e9:.2f} GB, 12 layers of 512 experts with I = 64, 37,000 pieces", rows, "cp")
        self.result["small"] = {"bytes": size, "rounds": self.rounds, "rows": rows}
        shutil.rmtree(source)

    def pieces(self) -> None:
        """What a piece costs."""
        found = []
        for layers in (6, 62):  # 10,000 and 96,000 pieces, all in one file of the output
            source, size = self.source("pieces", replace(TINY, layers=layers), shard_bytes=10**7)
            rows = self.compare(source, {**COPIES, "quarkconv": quarkconv})
            found.append({"layers": layers, "pieces": layers * 256 * 6, "bytes": size, "rows": rows})
            show(f"{size / 1e6:.0f} MB in {layers * 256 * 6:,} pieces in one file", rows, "cp")
            shutil.rmtree(source)
        self.result["pieces"] = {"rounds": self.rounds, "sizes": found}

    def checksums(self) -> None:
        """What could check a piece while it streams by: XXH3 of 128 bits is what the manifest has."""
        buffer = random.Random(0).randbytes(8 * 2**20)
        candidates: dict[str, Callable[[bytes], object]] = {
            "XXH3, 128 bits": lambda data: xxhash.xxh3_128_digest(data),
            "XXH3, 64 bits": lambda data: xxhash.xxh3_64_digest(data),
            "CRC-32 (zlib)": zlib.crc32,
            "MD5": lambda data: hashlib.md5(data).digest(),
            "SHA-256": lambda data: hashlib.sha256(data).digest(),
            "BLAKE2b": lambda data: hashlib.blake2b(data).digest(),
        }
        times: dict[str, list[float]] = {name: [] for name in candidates}
        for _ in range(7):
            for name, digest in candidates.items():
                started = time.perf_counter()
                for _ in range(4):
                    digest(buffer)
                times[name].append(time.perf_counter() - started)
        rates = {name: round(4 * len(buffer) / statistics.median(found) / 1e9, 2) for name, found in times.items()}
        print("\nchecksums, GB/s of one thread: " + ", ".join(f"{name} {rate}" for name, rate in rates.items()))
        self.result["checksums"] = {"rows": [{"name": name, "gb_per_s": rate} for name, rate in rates.items()]}


def _with_jobs(jobs: int, source: Path, out: Path) -> list[str | Path]:
    return quarkconv(source, out, "--jobs", str(jobs))


def _quantizing(to: str, source: Path, out: Path) -> list[str | Path]:
    return quarkconv(source, out, "--quantize", "all", to=to)


def _by_rank(way: str, source: Path, out: Path) -> list[str | Path]:
    return quarkconv(source, out, way, "8")


def main() -> None:
    """Measure, print tables, and save them in benchmarks/results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="cp,main,targets,quantize,layers,small,pieces,checksums")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where the data goes, 25 GB; it is deleted")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.folder) as temporary:
        bench = Bench(Path(temporary), options.rounds)
        for name in options.only.split(","):
            getattr(bench, name)()
    save("convert", bench.result, merge=True)


if __name__ == "__main__":
    main()
