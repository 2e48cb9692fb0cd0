"""Measure the fastest launch options on this GPU and write them as a table: python -m quarkconv.kernels.tune.

Each shape is timed at each number of tokens under a CUDA graph that cycles through several inputs and routings, so that
weights come from memory and not from L2. Weights are random and routings uniform, as load balancing of a trained router
intends. The table is written beside the kernels and used from the next process on.
"""

import argparse
import contextlib
import datetime
import functools
import json
import math
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from pathlib import Path

import torch

from .arguments import ExpertsArguments, check_arguments
from .backend import device_traits
from .candidates import starts, variations
from .options import fit_options
from .pipeline import empty_workspace, run_pipeline
from .tables import Options, Shape, Table, dump_table, parse_table, table_path

SHAPES: dict[str, Shape] = {
    "MiniMax-M2": (256, 8, 3072, 1536),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "Step-3.5-Flash": (288, 8, 4096, 1280),
    "Mixtral-8x7B": (8, 2, 4096, 14336),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
SLICES: dict[str, Shape] = {
    "Qwen3-235B/TP4": (128, 8, 4096, 384),
    "Qwen3-235B/TP8": (128, 8, 4096, 192),
    "MiniMax-M2/TP4": (256, 8, 3072, 384),
    "DeepSeek-V3/TP8": (256, 8, 7168, 256),
    "GLM-4.5-Air/TP2": (128, 8, 4096, 704),
    "Qwen3-Next": (512, 10, 2048, 512),
    "Qwen3-Next/TP4": (512, 10, 2048, 128),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "Mixtral/TP4": (8, 2, 4096, 3584),
    "DeepSeek-V3/EP8": (32, 8, 7168, 2048),
    "Kimi-K2/EP8": (48, 8, 7168, 2048),
}
"""What a rank has of a large model under tensor (TP) or expert (EP) parallelism, and models of many small experts."""
NAMED = SHAPES | SLICES
EXPERTS_IN_ALL = {SLICES["DeepSeek-V3/EP8"]: 256, SLICES["Kimi-K2/EP8"]: 384}
"""Experts of all ranks, among which tokens choose; elsewhere those of the shape."""
_MAX_INPUTS = 8
_MAX_INPUT_TOKENS = 4096
_FINALISTS = 4
_ROUNDS = 3


Weights = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]
"""w13, w2, w13_scale, w2_scale"""


def make_weights(shape: Shape, device: torch.device) -> Weights:
    """Random weights, with scales that keep activations near 1."""
    experts, _, hidden, intermediate = shape
    return (
        torch.randint(-127, 128, (experts, 2 * intermediate, hidden), dtype=torch.int8, device=device),
        torch.randint(-127, 128, (experts, hidden, intermediate), dtype=torch.int8, device=device),
        (0.5 + torch.rand((experts, 2 * intermediate, 1), device=device)) / (74 * hidden**0.5),
        (0.5 + torch.rand((experts, hidden, 1), device=device)) / (74 * intermediate**0.5),
    )


def make_call(shape: Shape, weights: Weights, tokens: int) -> ExpertsArguments:
    """One random input and routing for `weights`; -1 for experts of other ranks."""
    experts, top_k, hidden, _ = shape
    device = weights[0].device
    logits = torch.randn((tokens, EXPERTS_IN_ALL.get(shape, experts)), device=device)
    topk_weights, topk_ids = torch.softmax(logits, -1).topk(top_k, -1)
    topk_ids = torch.where(topk_ids < experts, topk_ids, -1)
    return check_arguments(
        torch.randn((tokens, hidden), device=device, dtype=torch.bfloat16),
        *weights,
        topk_weights.contiguous(),
        topk_ids.to(torch.int32).contiguous(),
    )


def time_calls(calls: Sequence[Callable[[], object]], repeats: int = 10, warm_up: float = 0.0) -> float:
    """Median microseconds of one call, all of them in one CUDA graph; after `warm_up` seconds of replays, or three."""
    for call in calls:
        call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    began, replays = time.monotonic(), 0
    while replays < 3 or time.monotonic() - began < warm_up:
        graph.replay()
        torch.cuda.synchronize()
        replays += 1
    times: list[float] = []
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def time_options(inputs: Sequence[ExpertsArguments], options: Options, repeats: int = 10) -> float:
    """Median microseconds of one forward with these options."""

    def call(arguments: ExpertsArguments) -> Callable[[], object]:
        out = torch.empty_like(arguments.hidden_states)
        workspace = empty_workspace(arguments, options)
        return lambda: run_pipeline(arguments, out, options, workspace)

    return time_calls([call(arguments) for arguments in inputs], repeats)


def compiles(shape: Shape, options: Options) -> bool:
    """Compile the products of these options into Triton's cache, by a forward over a few experts of this shape.

    False for options that take more of an SM than it has, which only the compiler knows.
    """
    from triton.runtime.errors import OutOfResources

    _, top_k, hidden, intermediate = shape
    few = (max(top_k, 8), top_k, hidden, intermediate)
    arguments = make_call(few, _few_weights(few), 8)
    try:
        run_pipeline(arguments, torch.empty_like(arguments.hidden_states), options)
    except OutOfResources:
        return False
    return True


@functools.lru_cache(maxsize=1)
def _few_weights(shape: Shape) -> Weights:
    return make_weights(shape, torch.device("cuda", torch.cuda.current_device()))


def search(shape: Shape, tokens: int, weights: Weights, pool: Executor | None) -> Options:
    """The fastest options: the best of `candidates.starts`, then its gate-up tile, then its down tile."""
    traits = device_traits(weights[0].device)
    inputs = [make_call(shape, weights, tokens) for _ in range(max(1, min(_MAX_INPUTS, _MAX_INPUT_TOKENS // tokens)))]
    times: dict[Options, float] = {}

    def fastest_of(found: Iterable[Options]) -> Options:
        fitted = dict.fromkeys(fit_options(o, shape[2], shape[3], traits) for o in found)
        new = [options for options in fitted if options not in times]
        each = functools.partial(compiles, shape)
        works = list(map(each, new) if pool is None else pool.map(each, new))  # all, before any is timed
        times.update(
            {o: time_options(inputs, o, repeats=4) if ok else math.inf for o, ok in zip(new, works, strict=True)}
        )
        return min(times, key=lambda options: times[options])

    best = fastest_of(starts(tokens, shape))
    best = fastest_of(variations(best, tokens, shape)[0])
    best = fastest_of(variations(best, tokens, shape)[1])
    # A GPU at its power limit is slower a moment later: the fastest are timed again, in turns.
    finalists = sorted(times, key=lambda options: times[options])[:_FINALISTS]
    rounds = [{options: time_options(inputs, options) for options in finalists} for _ in range(_ROUNDS)]
    return min(finalists, key=lambda options: statistics.median(again[options] for again in rounds))


def tune_shape(
    shape: Shape, tokens: Sequence[int], advance: Callable[[int], None], pool: Executor | None = None
) -> dict[int, Options]:
    """The fastest options for each number of tokens; `advance` is called after each."""
    weights = make_weights(shape, torch.device("cuda", torch.cuda.current_device()))
    best = {}
    for count in tokens:
        best[count] = search(shape, count, weights, pool)
        advance(1)
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quarkconv.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", action="append", metavar="NAME|E,K,H,I", help=f"repeatable; default: {', '.join(SHAPES)}"
    )
    parser.add_argument("--jobs", type=int, default=min(os.cpu_count() or 1, 16), help="processes that compile")
    parser.add_argument("--tokens", default=",".join(map(str, TOKENS)), help="numbers of tokens, with commas between")
    parser.add_argument("--out", type=Path, help="the file to write; default: the table beside the kernels")
    options = parser.parse_args(arguments)
    try:
        shapes = [parse_shape(text) for text in options.shape or SHAPES]
        tokens = [int(text) for text in options.tokens.split(",")]
        if min(tokens) < 1:
            raise ValueError(f"--tokens: expected positive numbers, found {options.tokens!r}")
    except ValueError as error:
        parser.error(str(error))
    if not torch.cuda.is_available():
        print("tune: needs a GPU, and torch finds none", file=sys.stderr)
        return 4
    print(tune_table(shapes, tokens, options.jobs, options.out))
    return 0


def tune_table(shapes: Sequence[Shape], tokens: Sequence[int], jobs: int, out: Path | None = None) -> Path:
    """Write the table of this GPU after each shape, with a bar on stderr; entries of other shapes stay.

    Args:
        shapes: experts, experts per token, hidden and intermediate size.
        tokens: numbers of tokens to tune for.
        jobs: processes that compile.
        out: the file to write; by default the table beside the kernels.

    Returns:
        The file.
    """
    name = torch.cuda.get_device_name()
    path = out or table_path(name)
    table: Table = parse_table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}
    measured = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "triton": _triton_version()}
    path.parent.mkdir(parents=True, exist_ok=True)

    from rich.console import Console
    from rich.progress import Progress

    pool = ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs > 1 else None
    with Progress(console=Console(stderr=True)) as progress, pool or contextlib.nullcontext():
        task = progress.add_task(name, total=len(shapes) * len(tokens))
        for shape in shapes:
            progress.update(task, description=f"{name} {'x'.join(map(str, shape))}")
            tuned = tune_shape(shape, tokens, lambda done: progress.advance(task, done), pool)
            table[shape] = table.get(shape, {}) | tuned
            torch.cuda.empty_cache()
            path.write_text(dump_table(name, measured, table), encoding="utf-8")
    return path


def parse_shape(text: str) -> Shape:
    """A name of SHAPES or SLICES, or experts, experts per token, hidden and intermediate size with commas between."""
    if text in NAMED:
        return NAMED[text]
    try:
        experts, top_k, hidden, intermediate = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--shape: expected one of {', '.join(NAMED)} or E,K,H,I, found {text!r}") from None
    if min(experts, top_k, hidden, intermediate) < 1 or top_k > experts:
        raise ValueError(f"--shape: expected positive sizes and K at most E, found {text!r}")
    return experts, top_k, hidden, intermediate


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
