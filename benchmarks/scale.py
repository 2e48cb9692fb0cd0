"""How a conversion scales over several workers, where the network of each worker is the limit.

    python benchmarks/scale.py [--workers 1 2 4 8] [--rounds 3] [--rate 8] [--layers 40] [--modes part join ray]

A store on loopback (benchmarks/store.py) gives each client, which is an access key, a fixed bandwidth in each
direction. Workers convert one model from it to it: with ``--part k/N`` or ``--join`` each in a process of its own, with
``--ray`` as nodes of a Ray cluster. All outputs must have the same bytes. For each run are reported

- the seconds from the moment when all interpreters have started, which share the processor of one machine here, until
  config.json is there, and the rate over all workers in that time;
- the rate of the steady phase: from the moment when a tenth of the bytes has been written until nine tenths have;
- the share of their bandwidth that the workers filled in both;
- the most memory that a process of a worker used, with ``--ray`` including Ray itself, and how busy the processor was.

A run begins and ends with about as many seconds for one worker as for eight, in which the network is not busy: headers
are read, and the first part of a shard, before anything is sent. Conversions of real checkpoints take minutes to hours.
The model is therefore so large that eight workers need half a minute, and a whole one on Ray; all modes together take
19 minutes.

Runs of few workers take place at the same time, as many as fit into the number of clients of the largest run: the
processor is then about as busy in all of them. A rate at which it is busy half of the time, or less, measures the
network. Tasks of Ray need more of it, so that their nodes have half of the rate. Medians of
the rounds of the fewest and the most workers; others, and ``--ray`` with one, run once. Results are kept after each
group of runs.
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
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from common import sampling, save
from store import Store, Stored

MB = 10**6
MODES: Final = ("part", "join", "ray")

_START: Final = """
import json, sys, time
import boto3, obstore.store
import quarkconv.cli.program, quarkconv.cloud.objects, quarkconv.convert.conversion
import quarkconv.write.joining, quarkconv.write.shares
from quarkconv.cli.main import main
"""
_RUN: Final = """
print("ready", flush=True)
sys.stdin.readline()
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 0, stop.code
finally:
    # ru_maxrss would include the memory of the process that started this one
    status = open("/proc/self/status").read()
    print(json.dumps({"memory": 1024 * int(status.partition("VmHWM:")[2].split()[0])}), file=sys.stderr)
"""
_ON_RAY: Final = """
import ray
def warm():
    import quarkconv.write.on_ray, quarkconv.cloud.objects, quarkconv.hub.locate, obstore.store
    time.sleep(6)
address = sys.argv[sys.argv.index("--ray") + 1]
ray.init(address=address, log_to_driver=False, logging_level="error")
from quarkconv.write.on_ray import STREAM_CPUS
task, slots = ray.remote(warm), int(ray.cluster_resources()["CPU"]) * int(1 / STREAM_CPUS)
ray.get([task.options(num_cpus=STREAM_CPUS, scheduling_strategy="SPREAD").remote() for _ in range(slots)])
"""


class Row(NamedTuple):
    """One run."""

    mode: str
    workers: int
    seconds: float
    link: float
    rate: float
    steady: float
    memory: int
    busy: float


class Process:
    """One command, as the client of its name. It begins at :meth:`start`; until then it imports its modules."""

    def __init__(self, client: str, url: str, prepare: str, *words: str) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-c", _START + prepare + _RUN, *words],
            env={**os.environ, **credentials(client, url)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )

    def ready(self) -> None:
        assert self._process.stdout is not None
        self._process.stdout.readline()

    def start(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.write(b"\n")
        self._process.stdin.flush()

    def memory(self) -> int:
        """The most memory in bytes, when the process has ended."""
        errors = self._process.communicate()[1].decode()
        if self._process.returncode:
            sys.exit(errors)
        return int(json.loads(errors.splitlines()[-1])["memory"])


def credentials(client: str, url: str) -> dict[str, str]:
    """The environment of a client. Payloads are not hashed, as over TLS."""
    return {
        "AWS_ENDPOINT_URL": url,
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": client,
        "AWS_SECRET_ACCESS_KEY": "x",
        "AWS_UNSIGNED_PAYLOAD": "true",
    }


class Nodes:
    """A Ray cluster of nodes of one CPU, each with its own bandwidth. Processes of tasks stay when they are idle."""

    def __init__(self, url: str) -> None:
        from ray.cluster_utils import Cluster

        from quarkconv.write.on_ray import STREAM_CPUS

        config = {"idle_worker_killing_time_threshold_ms": 10**7, "num_workers_soft_limit": int(1 / STREAM_CPUS)}
        head = {"num_cpus": 0, "include_dashboard": False, "_system_config": config}
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._url = url
        self._nodes: list[Any] = []
        self.clients: list[str] = []

    @property
    def address(self) -> str:
        return str(self._cluster.address)

    def resize(self, count: int) -> None:
        """Add or remove nodes until there are so many."""
        while len(self._nodes) > count:
            self._cluster.remove_node(self._nodes.pop())
            self.clients.pop()
        while len(self._nodes) < count:
            self.clients.append(f"node-{len(self._nodes) + 1}")
            self._nodes.append(self._cluster.add_node(num_cpus=1, env_vars=credentials(self.clients[-1], self._url)))

    def close(self) -> None:
        self._cluster.shutdown()


@dataclass
class Run:
    """A conversion by some workers, prepared."""

    mode: str
    workers: int
    out: str
    rate: float
    clients: list[str] = field(default_factory=list)
    processes: list[Process] = field(default_factory=list)

    @property
    def model(self) -> str:
        """Where the model is."""
        return "model-ray" if self.mode == "ray" else "model"

    def prepare(self, store: Store, shard_bytes: int, nodes: Nodes | None) -> None:
        """Start the processes."""
        words = [
            "convert",
            f"s3://bench/{self.model}",
            "--to",
            "fused-int8",
            "--out",
            f"s3://bench/{self.out}",
            "--quiet",
        ]
        words += ["--max-shard-size", str(shard_bytes)]
        if self.mode == "ray":
            assert nodes is not None
            nodes.resize(self.workers)
            self.clients = list(nodes.clients)
            self.processes = [Process(f"{self.out}-driver", store.url, _ON_RAY, *words, "--ray", nodes.address)]
            return
        self.clients = [f"worker-{self.out}-{number}" for number in range(1, self.workers + 1)]
        for number, client in enumerate(self.clients, start=1):
            options = ["--join"] if self.mode == "join" else ["--part", f"{number}/{self.workers}"]
            self.processes.append(Process(client, store.url, "", *words, *options))

    def row(self, store: Store, started: float, memory: int, busy: float) -> Row:
        """The result, when the processes have ended."""
        nbytes = sum(len(item.data) for item in store.below(f"{self.out}/").values())
        seconds = store.written[f"{self.out}/config.json"] - started
        return Row(
            self.mode,
            self.workers,
            seconds,
            self.rate,
            nbytes / seconds,
            steady_rate(store.sent(self.clients, "in", started)),
            memory,
            busy,
        )


@contextmanager
def memory_of_tasks() -> Iterator[list[int]]:
    """A list that receives the memory in bytes of the processes of Ray's tasks, Ray included; they end with a run."""

    def look() -> None:
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with suppress(OSError):  # it has ended
                if path.read_bytes().startswith(b"ray::"):
                    status = (path.parent / "status").read_text()
                    peaks.append(1024 * int(status.partition("VmHWM:")[2].split()[0]))

    peaks = [0]
    with sampling(look, 1):
        yield peaks


def steady_rate(sent: Sequence[tuple[float, int]]) -> float:
    """Bytes per second between a tenth and nine tenths of all bytes."""
    total, done = sum(nbytes for _, nbytes in sent), 0
    times: list[float] = []
    for moment, nbytes in sent:
        done += nbytes
        if len(times) < 2 and done >= total * (0.1, 0.9)[len(times)]:
            times.append(moment)
    return 0.8 * total / (times[1] - times[0])


def processor() -> tuple[int, int]:
    """Time that the processors were busy, and all time, in ticks."""
    with open("/proc/stat") as file:
        ticks = [int(word) for word in file.readline().split()[1:9]]
    return sum(ticks) - ticks[3] - ticks[4], sum(ticks)


def measure(group: Sequence[Run], store: Store, shard_bytes: int, nodes: Nodes | None) -> Iterator[Row]:
    """Carry out some runs at the same time."""
    for run in group:
        run.prepare(store, shard_bytes, nodes)
    processes = [process for run in group for process in run.processes]
    for process in processes:
        process.ready()
    before, started = processor(), time.monotonic()
    for process in processes:
        process.start()
    on_ray = any(run.mode == "ray" for run in group)
    with memory_of_tasks() if on_ray else nullcontext([0]) as peaks:
        memory = {run.out: max([process.memory() for process in run.processes]) for run in group}
    memory |= {run.out: max(peaks) for run in group if run.mode == "ray"}
    after = processor()
    for run in group:
        yield run.row(store, started, memory[run.out], (after[0] - before[0]) / (after[1] - before[1]))


def groups_of(workers: Sequence[int], rounds: int, modes: Sequence[str], rate: float) -> Iterator[list[Run]]:
    """All runs, those of few workers together; one at a time is on Ray. The fewest and the most workers come first."""
    fewest, most, number = min(workers), max(workers), 0
    for count in sorted(workers, key=lambda count: (count != fewest, -count)):
        repeated = rounds if count in (fewest, most) else 1
        pending = [mode for _ in range(repeated) for mode in modes if mode != "ray"]
        on_ray = (repeated if count == most else 1) if "ray" in modes else 0
        while pending or on_ray:
            chosen, at_once = ["ray"] * min(on_ray, 1), max(most // count, 1)
            on_ray -= len(chosen)
            while pending and len(chosen) < at_once:
                chosen.append(pending.pop(0))
            rates = {"ray": rate / 2}
            yield [Run(mode, count, f"out-{number + i}", rates.get(mode, rate)) for i, mode in enumerate(chosen)]
            number += len(chosen)


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Medians for each mode and number of workers, and their ratios to one worker of the mode."""
    found: dict[str, Any] = {}
    for mode, count in dict.fromkeys((row.mode, row.workers) for row in rows):
        runs = [row for row in rows if (row.mode, row.workers) == (mode, count)]
        rate, steady = (statistics.median(getattr(row, name) for row in runs) for name in ("rate", "steady"))
        found[f"{mode}, {count}"] = {
            "runs": len(runs),
            "seconds": statistics.median(row.seconds for row in runs),
            "rate": rate,
            "steady": steady,
            "filled": rate / count / runs[0].link,
            "filled_steady": steady / count / runs[0].link,
            "memory": max(row.memory for row in runs),
            "busy": statistics.median(row.busy for row in runs),
        }
    for name, item in found.items():
        one = found.get(f"{name.partition(',')[0]}, 1")
        if one is not None:
            item |= {"times_one": item["rate"] / one["rate"], "times_one_steady": item["steady"] / one["steady"]}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workers", type=int, nargs="+", default=[1, 2, 4, 8])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--modes", nargs="+", choices=MODES, default=["part", "join"])
    parser.add_argument("--rate", type=float, default=8, help="MB/s of each client in each direction")
    parser.add_argument("--layers", type=int, default=40, help="each has 36 MB")
    parser.add_argument("--ray-layers", type=int, default=40, help="of the model that is converted on Ray")
    parser.add_argument("--shard", type=float, default=7, help="MB of a shard at most; a tensor has up to 12.6")
    options = parser.parse_args()
    rate = options.rate * MB
    layers = {"model": options.layers} | ({"model-ray": options.ray_layers} if "ray" in options.modes else {})
    rows: list[Row] = []
    with Store({"worker-": rate, "node-": rate / 2}) as store, ExitStack() as stack:
        for model, count in layers.items():
            put_model(store, model, count)
        print("mode  workers  seconds    MB/s  filled  steady  filled  memory  processor", flush=True)
        nodes = None
        if "ray" in options.modes:
            nodes = Nodes(store.url)
            stack.callback(nodes.close)
        for group in groups_of(options.workers, options.rounds, options.modes, rate):
            for row in measure(group, store, int(options.shard * MB), nodes):
                rows.append(row)
                filled, steady = (each / row.workers / row.link for each in (row.rate, row.steady))
                print(
                    f"{row.mode:5} {row.workers:7} {row.seconds:8.1f} {row.rate / MB:7.2f} {filled:7.1%} "
                    f"{row.steady / MB:7.2f} {steady:7.1%} {row.memory / MB:4.0f} MB {row.busy:10.0%}",
                    flush=True,
                )
            for run in group:
                store.compare_and_delete(f"{run.out}/", run.model)
            models = {
                model: {"bytes": sum(map(size_of, store.below(f"{model}/").values())), "shards": store.shards(model)}
                for model in layers
            }
            found = {"models": models, "summary": summary(rows), "rows": [row._asdict() for row in rows]}
            save("scale", found)
    print(json.dumps(summary(rows), indent=1))


def put_model(store: Store, name: str, layers: int) -> None:
    """Make a model, with 4 experts in each layer as Qwen3-30B-A3B has them, and put its files into the store."""
    from support.checkpoints import make_checkpoint

    with tempfile.TemporaryDirectory() as folder:
        sizes: dict[str, Any] = {"layers": layers, "experts": 4, "hidden": 2048, "intermediate": 768}
        for path in make_checkpoint(Path(folder) / "model", shards=8, **sizes).iterdir():
            store.put(f"{name}/{path.name}", path.read_bytes())
    print(f"{name}: {sum(map(size_of, store.below(f'{name}/').values())) / MB:.0f} MB", flush=True)


def size_of(item: Stored) -> int:
    return len(item.data)


if __name__ == "__main__":
    main()
