"""What the benchmarks share: checkpoints to work on, processes to time, results to keep."""

from __future__ import annotations

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.moe_model import MoeModel

MINIMAX_M2 = MoeModel(
    hidden=3072, intermediate=1536, experts=256, top_k=8, query=6144, key=1024, vocabulary=200064,
    family="w1", moe="block_sparse_moe", router_bias=True, norms=("input_layernorm", "post_attention_layernorm"),
    model_type="minimax_m2",
)  # fmt: skip
"""A file-to-file export of MiniMax-M2; the others have its names and other sizes."""
QWEN3_30B = replace(MINIMAX_M2, hidden=2048, intermediate=768, experts=128, query=4096, key=512, vocabulary=151936)
MANY_SMALL = replace(MINIMAX_M2, hidden=2048, intermediate=64, experts=512, query=4096, key=512, vocabulary=1024)
TINY = replace(MINIMAX_M2, hidden=64, intermediate=32, query=64, key=64, vocabulary=1024)


class Sample(NamedTuple):
    """What a process took: wall and processor seconds, peak memory in bytes."""

    wall: float
    cpu: float
    peak: int


def measure(command: Sequence[str | Path]) -> Sample:
    """Run a process to its end, in silence. Python keeps its bytecode, as an installed package has it."""
    kept = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    started = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, env=kept)
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


@contextmanager
def sampling(look: Callable[[], None], seconds: float) -> Iterator[None]:
    """Call a function every so many seconds, in a thread of its own, until the block ends."""

    def watch() -> None:
        while not ended.wait(seconds):
            look()

    ended = threading.Event()
    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield
    finally:
        ended.set()
        watcher.join()


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """A list whose last item is the most memory that this process held, beyond what it held at the beginning."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    before, peaks = resident(), [0]
    with sampling(lambda: peaks.append(max(peaks[-1], resident() - before)), 0.02):
        yield peaks
