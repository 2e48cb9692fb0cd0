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
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE))

from figures import compare, medians, show
from filled import write_entry_point
from models import MODELS, write_model
from servers import REPACKED, Server
from worker import BACKENDS, FIGURES, NEW, PREFILL, PROFILE, PROMPT, PROMPTS, SHORT_PROMPT


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


def parsed() -> argparse.Namespace:
    """The command line."""
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
    return options


def command_of(options: argparse.Namespace) -> str:
    """The command that measures the same again."""
    names = (
        "model", "layers", "backends", "tables", "rounds", "decode_rounds", "distinct", "new_tokens", "tensor_parallel"
    )  # fmt: skip
    values = {name: getattr(options, name) for name in names}
    flags = [name for name in ("capture_prefill", "profile", "share") if getattr(options, name)]
    words = [f"--{name.replace('_', '-')} {value}" for name, value in values.items() if value is not None]
    words += [f"--{name.replace('_', '-')}" for name in flags]
    return f"python benchmarks/serve/throughput.py {' '.join(words)}"


def main() -> int:
    """Measure, write the result after each figure, and print it."""
    import torch

    options = parsed()
    if torch.cuda.device_count() < options.tensor_parallel:
        print(
            f"throughput: needs {options.tensor_parallel} GPU, torch finds {torch.cuda.device_count()}", file=sys.stderr
        )
        return 4
    device = torch.cuda.get_device_properties(0).name
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    document = {
        "benchmark": "serve", "model": options.model, "layers": options.layers, "device": device,
        "tensor_parallel": options.tensor_parallel, "date": datetime.date.today().isoformat(),
        "commit": options.commit or git.stdout.strip(), "torch": torch.__version__, "vllm": version("vllm"),
        "command": command_of(options),
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
