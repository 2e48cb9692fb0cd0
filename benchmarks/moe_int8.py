"""The INT8 MoE forward on one GPU: ours, vLLM's, and torch's in bfloat16, beside the floors of the hardware.

    python benchmarks/moe_int8.py [--shapes NAMES] [--tokens 1,2,4,8,16,64,256,1024,4096,16384] [--out FILE.json]
                                  [--update] [--jobs N]

Shapes: four models, slices of large ones as tensor- and expert-parallel ranks have them, and sizes that no table lists.

Every implementation runs under a CUDA graph that cycles through up to eight inputs and routings, so that weights come
from memory and not from L2. A time is the median of the replays over its calls, after replays for a twentieth of a
second: right after weights were created, a token of Mixtral took 95 us on an H200 for some 20 ms of replays, and 84
from then on. Before ours is timed, its result is checked against the torch twin on a few tokens. The others
(`moe_others`) run where they can be imported. With --jobs, as many processes compile everything before anything is
timed.

Floors: the bytes of the touched weights, and of the input and output, at the read bandwidth measured in the same run;
the products' operations at the rate of a plain dense int8 product, likewise; and the traffic of this design, which adds
to the bytes what passes between its launches, each value once written and once read: codes of x, h, its codes, and y.
"""

import argparse
import dataclasses
import datetime
import math
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
import triton
from moe_ceilings import measure_ceilings, time_graph
from moe_others import Bfloat16, Implementation, load_others
from moe_results import begin, describe, dump, print_means, record

from quarkconv.kernels import fused_experts_int8_reference
from quarkconv.kernels.activations import activate_reference, make_activation
from quarkconv.kernels.arguments import ExpertsArguments, ExpertWeights
from quarkconv.kernels.pipeline import default_options, run_pipeline, takes_sorted_rows
from quarkconv.kernels.tables import GemvOptions, Options, Shape, find_options, table_path
from quarkconv.kernels.tune import NAMED, SHAPES, Weights, make_call, make_weights

TOKENS = (1, 2, 4, 8, 16, 64, 256, 1024, 4096, 16384)
BIASED = {"gpt-oss-120b": {"activation": "swigluoai"}}
"""Shapes with biases and another activation. Humming and torch are not timed on these, nor on expert-parallel ranks."""
# Neither the shapes nor these numbers of tokens are in the table of launch options, except through what it says of
# neighbouring numbers for the last one.
UNLISTED: list[tuple[str, Shape, tuple[int, ...]]] = [
    ("DeepSeek-V3", (256, 8, 7168, 2048), (1, 33, 1000)),
    ("Qwen1.5-MoE", (60, 4, 2048, 1408), (3, 200, 2000)),
    ("Qwen3-30B-A3B", SHAPES["Qwen3-30B-A3B"], (3, 33, 200, 1000, 2000)),
]


def product(weights: ExpertWeights, expert: int, x: torch.Tensor) -> torch.Tensor:
    """One expert's product in float64."""
    y = (weights.codes[expert].double() * weights.scale[expert]) @ x
    return y if weights.bias is None else y + weights.bias[expert]


def check(arguments: ExpertsArguments, out: torch.Tensor) -> float:
    """Relative error of three tokens against float64 experts with activations that are not quantized.

    Before, the same tokens are compared with the torch twin: the same codes, scales and roundings. What differs are
    elements whose float32 value falls on the other side of a rounding to bfloat16, each by one step, 2^-8 of a value;
    leaving out a rounding costs 2^-9 of the whole.
    """
    tokens = sorted({0, arguments.tokens // 2, arguments.tokens - 1})
    up, down = arguments.gate_up, arguments.down
    x, weights, ids = (t[tokens] for t in (arguments.hidden_states, arguments.topk_weights, arguments.topk_ids))
    activation = arguments.activation
    more = {"w13_bias": up.bias, "w2_bias": down.bias, "activation": activation.name}
    twin = fused_experts_int8_reference(x, up.codes, down.codes, up.scale, down.scale, weights, ids, **more).double()
    difference, whole = (part.norm().item() for part in (out[tokens].double() - twin, twin))
    if not difference <= whole * 2.0**-9:  # both are 0 where other ranks have all experts of these tokens
        raise SystemExit(f"wrong result: {difference:.2g} from the torch twin, whose norm is {whole:.2g}")
    error = norm = 0.0
    for token in tokens:
        wide = arguments.hidden_states[token].double()
        expected = torch.zeros_like(wide)
        pairs = zip(arguments.topk_ids[token].tolist(), arguments.topk_weights[token].tolist(), strict=True)
        for expert, weight in pairs:
            if expert < 0:
                continue
            hidden = activate_reference(*product(up, expert, wide).chunk(2), activation)
            expected += weight * product(down, expert, hidden)
        error += (out[token].double() - expected).norm().item() ** 2
        norm += expected.norm().item() ** 2
    return math.sqrt(error / norm) if norm else 0.0


def time_ours(calls: list[ExpertsArguments], repeats: int) -> tuple[float, float]:
    """(microseconds, relative error)."""
    outs = [torch.full_like(call.hidden_states, math.nan) for call in calls]

    def run(call: ExpertsArguments, out: torch.Tensor) -> Callable[[], object]:
        return lambda: run_pipeline(call, out)

    runs = [run(call, out) for call, out in zip(calls, outs, strict=True)]
    runs[0]()
    error = check(calls[0], outs[0])
    return time_graph(runs, repeats), error


def compile_all(name: str, shape: Shape, counts: tuple[int, ...]) -> None:
    """Run each implementation once for each number of tokens, so that the caches on disk hold what it compiles."""
    torch.manual_seed(0)
    torch.cuda.empty_cache()  # of the shape before
    weights = make_weights(shape, torch.device("cuda"))
    others = load_others().of_shape(shape, weights, biased=name in BIASED)
    for count in counts:
        call = make_inputs(name, shape, weights, count)[0]
        run_pipeline(call, torch.empty_like(call.hidden_states))
        for other in others:
            other.compile(call)
        torch.cuda.synchronize()
        torch.cuda.empty_cache()  # other processes compile on the same GPU


def compile_first(work: list[tuple[str, Shape, tuple[int, ...]]], jobs: int) -> None:
    """Compile in so many processes, each some tokens of a shape; what fails here compiles when it is timed."""
    began = time.monotonic()
    parts = max(jobs // len(work), 1)
    shares = [(name, shape, counts[part::parts]) for part in range(parts) for name, shape, counts in work]
    shares = [share for share in shares if share[2]]
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) as pool:
        for (name, *_), future in [(share, pool.submit(compile_all, *share)) for share in shares]:
            if (error := future.exception()) is not None:
                print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
    print(f"compiled in {time.monotonic() - began:.0f} s", flush=True)


def make_inputs(name: str, shape: Shape, weights: Weights, tokens: int) -> list[ExpertsArguments]:
    """Up to eight inputs and routings."""
    calls = [make_call(shape, weights, tokens) for _ in range(max(1, min(8, 4096 // tokens)))]
    return [with_biases(call, **BIASED[name]) for call in calls] if name in BIASED else calls


def traffic(arguments: ExpertsArguments, pairs: float, touched_bytes: float) -> float:
    """Bytes of one forward as the design stores its intermediate values, each written once and read once."""
    options, hidden, intermediate = default_options(arguments), arguments.hidden, arguments.intermediate
    sorted_copies = takes_sorted_rows(arguments, options)
    codes = hidden * (pairs if sorted_copies else arguments.tokens)
    h = pairs * intermediate * 3  # 16-bit values and their codes
    y = 0 if isinstance(options, GemvOptions) else pairs * hidden * 2
    return touched_bytes + 4 * arguments.tokens * hidden + 2 * (codes + h + y)


def measure(
    name: str,
    shape: Shape,
    weights: Weights,
    tokens: int,
    ceilings: dict[str, float],
    others: list[Implementation],
    repeats: int,
) -> dict[str, Any]:
    """One row."""
    experts, top_k, hidden, intermediate = shape
    calls = make_inputs(name, shape, weights, tokens)
    chosen = [call.topk_ids[call.topk_ids >= 0] for call in calls]
    touched = statistics.mean(ids.unique().numel() for ids in chosen)
    pairs = statistics.mean(ids.numel() for ids in chosen)
    size = 3 * hidden * intermediate
    ours, error = time_ours(calls, repeats)
    row = {
        "shape": name,
        "experts": experts,
        "top_k": top_k,
        "hidden": hidden,
        "intermediate": intermediate,
        "tokens": tokens,
        "ours_us": ours,
        "error": error,
        "bytes_floor_us": (touched * size + 4 * tokens * hidden) / ceilings["read_bytes_per_s"] * 1e6,
        "operations_floor_us": 2 * pairs * size / ceilings["int8_ops_per_s"] * 1e6,
        "traffic_floor_us": traffic(calls[0], pairs, touched * size) / ceilings["read_bytes_per_s"] * 1e6,
        "touched_experts": touched,
        "from_table": find_options(torch.cuda.get_device_name(), tokens, experts, top_k, hidden, intermediate)
        is not None,
        "options": summary(default_options(calls[0])),
    }
    for other in others:
        row |= other.time(calls, repeats)
    return row


def with_biases(call: ExpertsArguments, activation: str) -> ExpertsArguments:
    """The same call with random biases and another activation."""

    def biased(part: ExpertWeights) -> ExpertWeights:
        return dataclasses.replace(part, bias=torch.randn(part.codes.shape[:2], device=part.codes.device) / 8)

    function = make_activation(activation)
    return dataclasses.replace(call, gate_up=biased(call.gate_up), down=biased(call.down), activation=function)


def summary(options: Options) -> str:
    """Launch options in short: rows of a block + of a tail / of a short block; columns x depth, the rest of a tile."""
    if isinstance(options, GemvOptions):
        tiles = [f"{tile.block_n} columns, {tile.num_warps} warps" for tile in (options.gate_up, options.down)]
        return f"without sorting; gate-up {tiles[0]}; down {tiles[1]}"
    blocks = f"{options.blocks.block_m} + {options.blocks.tail_m} / {options.blocks.small_m} rows"
    tiles = [
        f"{tile.block_n} x {tile.block_k}, group {tile.group_m}, {tile.num_warps} warps, {tile.num_stages} stages"
        + (", specialized" if tile.specialized else "") + ("" if tile.descriptors else ", pointers")
        for tile in (options.gate_up, options.down)
    ]  # fmt: skip
    return f"{blocks}; gate-up {tiles[0]}; down {tiles[1]}"


def parse_sizes(text: str, tokens: tuple[int, ...]) -> list[tuple[str, Shape, tuple[int, ...]]]:
    """Shapes by name, each with `tokens` or with its own: ``Qwen3-30B-A3B,Mixtral-8x7B=1+8``."""
    named = (part.partition("=") for part in text.split(","))
    return [(name, NAMED[name], tuple(map(int, own.split("+"))) if own else tokens) for name, _, own in named]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(NAMED), help="NAME or NAME=1+8+64, with commas between")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)))
    parser.add_argument("--others", action=argparse.BooleanOptionalAction, default=True, help="sizes not in the table")
    parser.add_argument("--repeats", type=int, default=20, help="replays of each graph, of which the median counts")
    parser.add_argument("--budget", type=float, default=240, help="seconds after which only ours is timed")
    parser.add_argument("--jobs", type=int, default=0, help="processes that compile first, 20 GB of the GPU each")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/moe-int8-<device>.json")
    parser.add_argument("--update", action="store_true", help="keep the cells of --out that this run does not time")
    parser.add_argument("--commit", default=None, help="what to record; default: git's HEAD")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("moe_int8: needs a GPU, and torch finds none", file=sys.stderr)
        return 4
    tokens = tuple(int(text) for text in options.tokens.split(","))
    work = parse_sizes(options.shapes, tokens) + (UNLISTED if options.others else [])
    if options.jobs:
        compile_first(work, options.jobs)
    began = time.monotonic()
    device = torch.cuda.get_device_name()
    path = options.out or Path(__file__).parent / "results" / f"moe-int8-{table_path(device).name}"
    torch.manual_seed(0)
    loaded = load_others()
    ceilings = measure_ceilings()
    commit = options.commit
    if commit is None:
        git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
        commit = git.stdout.strip()
    today = datetime.date.today().isoformat()
    head = {
        "device": device,
        "date": today,
        "torch": torch.__version__,
        "triton": triton.__version__,
        "vllm": None if loaded.vllm is None else loaded.vllm.version,
    }
    command = " ".join(["python benchmarks/moe_int8.py", *sys.argv[1:]])
    run = {"date": today, "commit": commit, "command": command, "ceilings": ceilings}
    document = begin(head, run, path if options.update else None)
    print(f"{document['device']}, torch {torch.__version__}, triton {triton.__version__}, vLLM {document['vllm']}")
    print(f"reads {ceilings['read_bytes_per_s'] / 1e12:.2f} TB/s, int8 {ceilings['int8_ops_per_s'] / 1e12:.0f} TOP/s")
    columns = ("ours", "default", "tuned", "humming", "torch", "bytes", "products", "traffic")
    print(
        f"{'microseconds':15} {'M':>5} " + " ".join(f"{name:>9}" for name in columns) + "  vs d  vs t  vs h over floor"
    )
    for name, shape, counts in work:
        listed = (name, shape, counts) not in UNLISTED
        weights = make_weights(shape, torch.device("cuda"))
        group = ("model" if name in SHAPES else "slice") if listed else "other"
        others = loaded.of_shape(shape, weights, biased=name in BIASED)
        if group == "model" and time.monotonic() - began < options.budget:
            others.append(Bfloat16(weights[0].bfloat16(), weights[1].bfloat16()))
        for count in counts:
            late = time.monotonic() - began > options.budget
            row = measure(name, shape, weights, count, ceilings, [] if late else others, options.repeats)
            record(document, row | {"group": group})
            print(describe(row), flush=True)
            path.write_text(dump(document), encoding="utf-8")
        del weights, others
        torch.cuda.empty_cache()
    print_means([row for row in document["rows"] if row["run"] == len(document["runs"]) - 1])
    return 0


if __name__ == "__main__":
    sys.exit(main())
