"""Measure the fastest launch options on this GPU and write them as a table: python -m quarkconv.kernels.tune.

Each shape is timed at each number of tokens under a CUDA graph that cycles through several inputs and routings, so that
weights come from memory and not from L2. Weights are random and routings uniform, as load balancing of a trained router
intends. The table is written beside the kernels and used from the next process on.
"""

import argparse
import datetime
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch

from .arguments import ExpertsArguments, check_arguments
from .backend import device_traits
from .options import (
    fit_options,
    fits_registers,
    gemv_options,
    heuristic_options,
    mean_rows_of,
    portable_tiles,
    specialized_tiles,
)
from .pipeline import empty_workspace, run_pipeline
from .tables import (
    GemvOptions,
    LaunchOptions,
    Options,
    RowBlocks,
    Shape,
    Table,
    TileOptions,
    VectorTile,
    dump_table,
    parse_table,
    table_path,
)

SHAPES: dict[str, Shape] = {
    "MiniMax-M2": (256, 8, 3072, 1536),
    "Qwen3-30B-A3B": (128, 8, 2048, 768),
    "Step-3.5-Flash": (288, 8, 4096, 1280),
    "Mixtral-8x7B": (8, 2, 4096, 14336),
}
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 16384)
_MAX_INPUTS = 8
_MAX_INPUT_TOKENS = 4096
_FINALISTS = 5
_ROUNDS = 3


def candidates(tokens: int, shape: Shape) -> list[Options]:
    """Options worth timing: the heuristic's first, then those that won somewhere nearby."""
    experts, top_k, hidden, intermediate = shape
    pairs, mean_rows = tokens * top_k, mean_rows_of(tokens, experts, top_k)
    found: list[Options] = [heuristic_options(tokens, experts, top_k, specialized=each) for each in (True, False)]

    if pairs <= 64:
        gemv = gemv_options(top_k, hidden, intermediate)
        if gemv is not None:
            wider = VectorTile(gemv.down.block_n * 2, gemv.down.num_warps * 2)
            downs = (gemv.down, wider, VectorTile(4, 4))
            gate_ups = (gemv.gate_up, VectorTile(8, 8), VectorTile(4, 2), VectorTile(2, 1))
            pairings = [GemvOptions(gate_up, down) for gate_up in gate_ups for down in downs]
            found += [options for options in pairings if fits_registers(options, top_k, hidden, intermediate)]
        decode = [
            (TileOptions(128, 256, 1, 4, 3), TileOptions(64, 256, 1, 4, 3)),
            (TileOptions(64, 256, 1, 4, 3), TileOptions(64, 256, 1, 4, 3)),
            (TileOptions(64, 512, 1, 4, 3), TileOptions(64, 256, 1, 4, 3)),
            (TileOptions(128, 256, 1, 4, 3), TileOptions(64, 512, 1, 4, 4)),
            (TileOptions(128, 256, 1, 4, 3), TileOptions(128, 256, 1, 4, 3)),
        ]
        found += [LaunchOptions(RowBlocks(16), gate_up, down) for gate_up, down in decode]
    if mean_rows <= 20:
        found += [
            LaunchOptions(blocks, gate_up, down)
            for blocks in (RowBlocks(16), RowBlocks(32, 0, 16))
            for gate_up, down in (
                (TileOptions(64, 256, 1, 4, 3), TileOptions(64, 256, 1, 4, 3)),
                (TileOptions(64, 256, 1, 4, 3), TileOptions(128, 128, 1, 4, 4)),
                (TileOptions(64, 128, 1, 4, 5), TileOptions(128, 128, 1, 4, 4)),
            )
        ]
    if 6 < mean_rows <= 80:
        for blocks in (RowBlocks(32, 16, 16), RowBlocks(32, 0, 16), RowBlocks(64, 16, 32), RowBlocks(64, 32, 16)):
            gate_up, down = portable_tiles(4)
            found += [LaunchOptions(blocks, gate_up, each) for each in (down, specialized_tiles(4)[0][1])]
    if mean_rows > 40:
        for blocks in (RowBlocks(128, 32, 64), RowBlocks(128, 32, 32), RowBlocks(128, 32), RowBlocks(128, 16, 32)):
            found.append(LaunchOptions(blocks, *portable_tiles(8)))
        found.append(LaunchOptions(RowBlocks(128, 32), *portable_tiles(4)))
        found += [LaunchOptions(RowBlocks(128, 32, 64), *tiles) for tiles in _specialized_tiles()]
    return list(dict.fromkeys(found))


def _specialized_tiles() -> Iterator[tuple[TileOptions, TileOptions]]:
    """Tiles of gate-up and down of which at least one has specialized warps."""
    plain = portable_tiles(8)
    for group in (8, 4):
        ping_pong, cooperative = specialized_tiles(group)
        yield from ((plain[0], ping_pong[1]), (ping_pong[0], plain[1]), ping_pong)
        yield from ((cooperative[0], ping_pong[1]), cooperative)
        yield specialized_tiles(1)[0][0], ping_pong[1]


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
    """One random input and routing for `weights`."""
    experts, top_k, hidden, _ = shape
    device = weights[0].device
    logits = torch.randn((tokens, experts), device=device)
    topk_weights, topk_ids = torch.softmax(logits, -1).topk(top_k, -1)
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


def time_options(inputs: Sequence[ExpertsArguments], options: Options) -> float:
    """Median microseconds of one forward with these options."""

    def call(arguments: ExpertsArguments) -> Callable[[], object]:
        out = torch.empty_like(arguments.hidden_states)
        workspace = empty_workspace(arguments, options)
        return lambda: run_pipeline(arguments, out, options, workspace)

    return time_calls([call(arguments) for arguments in inputs])


def tune_shape(shape: Shape, tokens: Sequence[int], advance: Callable[[int], None]) -> dict[int, Options]:
    """The fastest options for each number of tokens; `advance` is called after each."""
    device = torch.device("cuda", torch.cuda.current_device())
    traits = device_traits(device)
    weights = make_weights(shape, device)
    best = {}
    for count in tokens:
        inputs = [make_call(shape, weights, count) for _ in range(max(1, min(_MAX_INPUTS, _MAX_INPUT_TOKENS // count)))]
        fitted = dict.fromkeys(fit_options(options, shape[2], shape[3], traits) for options in candidates(count, shape))
        times = {options: time_options(inputs, options) for options in fitted}
        # A GPU at its power limit is slower a moment later: the fastest are timed again, in turns.
        finalists = sorted(times, key=lambda options: times[options])[:_FINALISTS]
        rounds = [{options: time_options(inputs, options) for options in finalists} for _ in range(_ROUNDS)]
        best[count] = min(finalists, key=lambda options: statistics.median(again[options] for again in rounds))
        advance(1)
    return best


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m quarkconv.kernels.tune", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--shape", action="append", metavar="NAME|E,K,H,I", help=f"repeatable; default: {', '.join(SHAPES)}"
    )
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
    name = torch.cuda.get_device_name()
    path = options.out or table_path(name)
    # Entries of other shapes stay.
    table: Table = parse_table(json.loads(path.read_text(encoding="utf-8"))) if path.is_file() else {}

    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True)) as progress:
        task = progress.add_task(name, total=len(shapes) * len(tokens))
        for shape in shapes:
            progress.update(task, description=f"{name} {'x'.join(map(str, shape))}")
            table[shape] = table.get(shape, {}) | tune_shape(shape, tokens, lambda done: progress.advance(task, done))
            torch.cuda.empty_cache()
    measured = {"date": datetime.date.today().isoformat(), "torch": torch.__version__, "triton": _triton_version()}
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(dump_table(name, measured, table), encoding="utf-8")
    print(path)
    return 0


def parse_shape(text: str) -> Shape:
    """A name of SHAPES, or experts, experts per token, hidden and intermediate size with commas between."""
    if text in SHAPES:
        return SHAPES[text]
    try:
        experts, top_k, hidden, intermediate = (int(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"--shape: expected one of {', '.join(SHAPES)} or E,K,H,I, found {text!r}") from None
    if min(experts, top_k, hidden, intermediate) < 1 or top_k > experts:
        raise ValueError(f"--shape: expected positive sizes and K at most E, found {text!r}")
    return experts, top_k, hidden, intermediate


def _triton_version() -> str:
    import triton

    return str(triton.__version__)


if __name__ == "__main__":
    sys.exit(main())
