"""Tokens per second of vLLM with INT8 MoE layers on its own backends and on quarkconv's, side by side on one GPU.

    python benchmarks/serve/throughput.py --model Qwen3-30B-A3B --layers 24 [--backends triton,humming,quarkconv]

Each backend is an `LLM` of vLLM in a process of its own (worker.py), with CUDA graphs and torch.compile, on the same
random weights (`filled`). All start first, and load one after the other; with --share, backends that keep vLLM's
layouts have one copy of the weights; with --distinct N, layers after the first N repeat their experts, so that a model
that is larger than the GPU runs with all of its layers. Then each figure is measured in turn, round after round in
alternating order, while the others wait. Prefill: prompts of 8192 tokens, one new token; it runs in CUDA graphs only
with --capture-prefill. Decode: the median time of a step in which all sequences decode, after prompts of 128 tokens.
Log-probabilities of one prompt are compared between backends. With --profile, one prefill of each follows under torch's
profiler: how long its kernels took, and for which part of the time the GPU was busy; for the rest it waited for the
host.

Writes benchmarks/results/serve-<model>-<device>.json, or --out, after each figure: a run that is cut keeps what it
measured. vLLM, and quarkconv with its entry point, must be installed, or lie on PYTHONPATH with their metadata.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import re
import select
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from filled import DISTINCT, SHARED, TURN, write_entry_point
from models import MODELS, write_model
from worker import BACKENDS, FIGURES, NEW, PREFILL, PROFILE, PROMPT, PROMPTS, SEQUENCES, SHORT_PROMPT

REPACKED = ("humming", "humming-int8")
"""Backends with layouts of their own; the others can share the parameters of one. They load first, since repacking
takes more memory than the model."""


class Server:
    """A worker process with one LLM. It answers one request at a time: "load", then names of figures."""

    def __init__(self, name: str, model: Path, options: argparse.Namespace, folder: Path) -> None:
        reading, writing = os.pipe()
        environment = os.environ | BACKENDS[name][1] | {"VLLM_CACHE_ROOT": str(folder / f"cache-{name}")}
        if "VLLM_TUNED_CONFIG_FOLDER" in BACKENDS[name][1]:
            environment["VLLM_TUNED_CONFIG_FOLDER"] = str(options.tables.resolve())
        self.turn = folder / f"turn-{name}"
        environment[TURN] = str(self.turn)
        if options.share and name not in REPACKED:
            environment[SHARED] = str(folder / "shared")
        if options.distinct is not None:
            environment[DISTINCT] = str(options.distinct)
        paths = [str(folder), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment["PYTHONPATH"] = os.pathsep.join(paths)
        self.name = name
        self.log = folder / f"{name}.log"
        given = {
            key: getattr(options, key) for key in ("cache_bytes", "tensor_parallel", "capture_prefill", "new_tokens")
        }
        given["traces"] = str(folder / f"traces-{name}") if options.profile else ""
        command = [sys.executable, str(HERE / "worker.py"), name, str(model), str(writing), json.dumps(given)]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=environment, pass_fds=[writing]
            )
        os.close(writing)
        self.results = os.fdopen(reading)

    def request(self, what: str) -> None:
        """Send a request; `read` returns the answer."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.write(f"{what}\n".encode())
            self.process.stdin.flush()

    def read(self) -> Any:
        """The next answer, or None if the process has ended."""
        line = self.results.readline()
        return json.loads(line) if line else None

    def measure(self, figure: str) -> Any:
        """Measure a figure once, or `PROFILE`; None if the process has ended."""
        self.request(figure)
        return self.read()

    def wait(self, seconds: float) -> None:
        """Until there is an answer to read; after so many seconds the process is ended."""
        if not select.select([self.results], [], [], max(seconds, 0.0))[0]:
            self.process.kill()

    def load(self) -> None:
        """Let it build its model; returns when the weights are loaded, or the process has ended."""
        self.turn.touch()
        while self.process.poll() is None and b"Model loading took" not in self.log.read_bytes():
            time.sleep(0.5)

    def end(self) -> None:
        """Let the process end, without waiting for it."""
        assert self.process.stdin is not None
        with suppress(BrokenPipeError):
            self.process.stdin.close()

    def stop(self) -> None:
        """End the process."""
        self.end()
        try:
            self.process.wait(60)
        except subprocess.TimeoutExpired:
            self.process.kill()

    def backend_lines(self) -> list[str]:
        """What vLLM logged about the backend of the experts, without times."""
        text = self.log.read_text(errors="replace")
        lines = re.findall(r"(?:Using [^\n]*MoE backend[^\n]*|quarkconv: [^\n]*)", text)
        return list(dict.fromkeys(lines))


def compare(logprobs: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Largest and mean difference of the prompt's log-probabilities, for each pair of backends."""
    names, found = list(logprobs), {}
    for i, first in enumerate(names):
        for second in names[i + 1 :]:
            gaps = [abs(a - b) for a, b in zip(logprobs[first], logprobs[second], strict=True)]
            found[f"{first} and {second}"] = {"max": max(gaps), "mean": statistics.mean(gaps)}
    return found


def medians(values: dict[str, list[float]]) -> dict[str, Any]:
    """The median of each figure that was measured, decode also in tokens per second, and the values."""
    found = {figure: statistics.median(each) for figure, each in values.items() if each}
    steps = {figure: value for figure, value in found.items() if figure != PREFILL}
    return {
        "prefill_tokens_per_s": found.get(PREFILL),
        "decode_step_ms": steps,
        "decode_tokens_per_s": {count: 1e3 * int(count) / ms for count, ms in steps.items()},
        "values": values,
    }


def show(rows: dict[str, Any]) -> None:
    """Print a table: tokens per second, and the ratio of quarkconv to the best of the others."""
    print(f"{'tokens/s':14} " + " ".join(f"{column:>12}" for column in [PREFILL, *(f"decode {n}" for n in SEQUENCES)]))
    values: dict[str, dict[str, float]] = {}
    for name, row in rows.items():
        if "error" in row:
            print(f"{name:14} {row['error']}")
            continue
        prefill = row["prefill_tokens_per_s"]
        values[name] = ({} if prefill is None else {PREFILL: prefill}) | row["decode_tokens_per_s"]
        print(f"{name:14} " + " ".join(f"{values[name].get(figure, float('nan')):12.0f}" for figure in FIGURES))
    ours = values.pop("quarkconv", {})
    best = {figure: max((each[figure] for each in values.values() if figure in each), default=0.0) for figure in ours}
    ratios = [ours[figure] / best[figure] if best.get(figure) else float("nan") for figure in FIGURES]
    print(f"{'over the best':14} " + " ".join(f"{ratio:12.3f}" for ratio in ratios))


def start(options: argparse.Namespace, folder: Path) -> list[Server]:
    """Start a server for each backend; their models are loaded one after the other."""
    model = write_model(options.model, options.layers, folder / options.model)
    write_entry_point(folder)
    names = [name for name in options.backends.split(",") if name != "triton-tuned" or options.tables]
    servers = [Server(name, model, options, folder) for name in names]
    for server in servers:
        server.request("load")
    for server in sorted(servers, key=lambda server: server.name not in REPACKED):
        server.load()
    return servers


def run(options: argparse.Namespace, folder: Path, save: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Start the servers, measure them in turn, stop them; what was measured is saved after each figure."""
    began = time.monotonic()
    servers = start(options, folder)
    rows: dict[str, Any] = {}
    logprobs: dict[str, list[float]] = {}
    running = []
    for server in servers:
        server.wait(options.start_within - (time.monotonic() - began))
        ready = server.read()
        if ready is None:
            last = server.log.read_text(errors="replace").strip().splitlines()[-1:]
            rows[server.name] = {"error": f"not ready: {''.join(last)[:300]}"}
        else:
            running.append(server)
            logprobs[server.name] = ready["logprobs"]
            rows[server.name] = {"ready_s": ready["ready_s"], "log": server.backend_lines()}
        print(f"{server.name}: {rows[server.name]}", flush=True)
    found = {"backends": rows, "logprob_differences": compare(logprobs)}
    save(found)
    values: dict[str, dict[str, list[float]]] = {server.name: {figure: [] for figure in FIGURES} for server in running}
    for number in range(max(options.rounds, options.decode_rounds)):
        for figure in FIGURES:
            if number >= (options.rounds if figure == PREFILL else options.decode_rounds):
                continue
            for server in running if number % 2 == 0 else running[::-1]:
                value = server.measure(figure)
                if value is not None:
                    values[server.name][figure].append(value)
                    rows[server.name] |= medians(values[server.name])
                    save(found)
        print(f"round {number + 1}", flush=True)
    for server in running if options.profile else ():
        rows[server.name][PROFILE] = server.measure(PROFILE)
        save(found)
    for server in running:
        server.end()
    for server in running:
        server.stop()
    for server in servers if options.logs else ():
        (options.logs / f"{options.model}-{server.name}.log").write_bytes(server.log.read_bytes()[-1_000_000:])
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, required=True)
    parser.add_argument("--layers", type=int, required=True, help="layers of the model that are kept")
    parser.add_argument("--backends", default=",".join(BACKENDS))
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="GPUs of each backend")
    parser.add_argument("--tables", type=Path, help="folder of tuned tables for vLLM's Triton backend")
    parser.add_argument("--rounds", type=int, default=5, help="of prefill, of which the medians count")
    parser.add_argument("--decode-rounds", type=int, default=5, help="of decode")
    parser.add_argument(
        "--capture-prefill",
        action="store_true",
        help=f"CUDA graphs of {PROMPT} tokens too, so that prefill runs in them",
    )
    parser.add_argument("--profile", action="store_true", help="one prefill of each backend under torch's profiler")
    parser.add_argument("--share", action="store_true", help="one copy of the weights for backends of the same layouts")
    parser.add_argument(
        "--distinct", type=int, metavar="N", help="layers with experts of their own; others repeat these"
    )
    parser.add_argument("--new-tokens", type=int, default=NEW, metavar="N", help="of each sequence of decode")
    parser.add_argument("--cache-bytes", type=int, default=6 << 30, help="key-value cache of each backend on a GPU")
    parser.add_argument("--start-within", type=float, default=900.0, metavar="SECONDS", help="else it is left out")
    parser.add_argument("--logs", type=Path, help="folder to keep the processes' logs in")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit", help="what to record; default: git's HEAD")
    options = parser.parse_args()
    if options.share and options.tensor_parallel > 1:
        parser.error("--share is for one GPU")
    import torch

    if torch.cuda.device_count() < options.tensor_parallel:
        print(
            f"throughput: needs {options.tensor_parallel} GPU, torch finds {torch.cuda.device_count()}", file=sys.stderr
        )
        return 4
    device = torch.cuda.get_device_properties(0).name
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    chosen = f"--model {options.model} --layers {options.layers} --backends {options.backends}"
    chosen += f" --tables {options.tables}" if options.tables else ""
    chosen += f" --rounds {options.rounds} --decode-rounds {options.decode_rounds}"
    chosen += (
        " --capture-prefill" * options.capture_prefill + " --profile" * options.profile + " --share" * options.share
    )
    chosen += f" --distinct {options.distinct}" if options.distinct is not None else ""
    chosen += f" --new-tokens {options.new_tokens}" if options.new_tokens != NEW else ""
    document = {
        "benchmark": "serve", "model": options.model, "layers": options.layers, "device": device,
        "tensor_parallel": options.tensor_parallel, "date": datetime.date.today().isoformat(),
        "commit": options.commit or git.stdout.strip(), "torch": torch.__version__, "vllm": version("vllm"),
        "command": f"python benchmarks/serve/throughput.py {chosen} --tensor-parallel {options.tensor_parallel}",
        "prefill": f"{PROMPTS} prompts of {PROMPT} tokens", "decode": f"prompts of {SHORT_PROMPT} tokens",
    }  # fmt: skip
    ranks = f"-tp{options.tensor_parallel}" if options.tensor_parallel > 1 else ""
    name = f"serve-{options.model}{ranks}-{device}".lower().replace(" ", "-")
    path = options.out or HERE.parent / "results" / f"{name}.json"

    def save(found: dict[str, Any]) -> None:
        path.write_text(json.dumps(document | found, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        result = run(options, Path(folder), save)
    show(result["backends"])
    for pair, gap in result["logprob_differences"].items():
        print(f"log-probabilities of {pair}: max {gap['max']:.4f}, mean {gap['mean']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
