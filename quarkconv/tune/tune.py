"""Time an engine's kernel over a pruned grid and write its tables."""

from __future__ import annotations

import datetime
import multiprocessing
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from quarkconv.errors import UnsupportedError, UsageError
from quarkconv.progress import SILENT, Progress
from quarkconv.text import alternatives
from quarkconv.tune.grid import Tile, starts, variations
from quarkconv.tune.kernels import Kernel, Routed, engine_kernel
from quarkconv.tune.search import Search, Timings, run_together, search
from quarkconv.tune.shapes import RankShape
from quarkconv.tune.tables import MEASURED, Timing, dump_table, record
from quarkconv.write.durable import write_durably

if TYPE_CHECKING:
    from quarkconv.tune.kernels import Weights

TOKENS: Final = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096)
"""Numbers of tokens to tune for: engines take the nearest, so that the last serves all larger ones."""
_MAX_INPUTS: Final = 8
_MAX_INPUT_TOKENS: Final = 4096


@dataclass(frozen=True, slots=True)
class WrittenTable:
    """A table that was written.

    Attributes:
        path: the file.
        shape: what it is for.
        timings: by tokens; empty of quarkconv's own table, which holds no times.
    """

    path: Path
    shape: RankShape
    timings: dict[int, Timing]

    @property
    def gain(self) -> float:
        """Geometric mean over the numbers of tokens of time by default / time tuned."""
        ratios = [each.default_us / each.tuned_us for each in self.timings.values()]
        return statistics.geometric_mean(ratios) if ratios else 1.0

    def to_json(self) -> dict[str, Any]:
        """An entry of ``tables`` of quarkconv.tune/1."""
        rows = {
            str(tokens): {"default_us": each.default_us, "tuned_us": each.tuned_us, **each.tile.to_json()}
            for tokens, each in sorted(self.timings.items())
        }
        return {"path": str(self.path), **asdict(self.shape), "tokens": rows}


def require_gpu() -> None:
    """Refuse a machine without a GPU.

    Raises:
        UnsupportedError: torch finds none.
    """
    import torch

    if not torch.cuda.is_available():
        raise UnsupportedError(
            "tune needs a GPU, but torch finds none",
            hint="run this on the machine that serves, with a torch built for its GPU",
        )


def tune_engine(
    engine: str,
    shapes: Sequence[RankShape],
    folder: Path,
    *,
    tokens: Sequence[int] = TOKENS,
    jobs: int = 1,
    progress: Progress = SILENT,
) -> list[WrittenTable]:
    """Write a table for each shape, and the record of what was measured.

    Shapes whose tables have the same name get one table together. Table and record are written again with each tile
    that was found: an interrupted run leaves a table of the fastest so far.

    Args:
        engine: ``vllm`` or ``sglang``, which must be installed.
        shapes: what ranks have of the experts.
        folder: the folder that the engine's variable is to name.
        tokens: numbers of tokens to tune for.
        jobs: processes that compile.
        progress: counts pairs of table and number of tokens, twice each.

    Raises:
        UnsupportedError: there is no GPU, or the engine is not installed.
        UsageError: the folder has another file of the record's name.
        WriteError: the folder cannot be written.
    """
    require_gpu()
    written = []
    with ProcessPoolExecutor(jobs, multiprocessing.get_context("spawn")) if jobs > 1 else nullcontext() as pool:
        if pool is not None:
            for _ in range(jobs):
                pool.submit(_import, engine)  # takes longer than the first tiles: meanwhile this process imports it too
        kernel = engine_kernel(engine)
        tables: dict[Path, list[RankShape]] = {}
        for shape in dict.fromkeys(shapes):
            tables.setdefault(kernel.table_path(folder, shape), []).append(shape)
        progress.step(f"Timing {kernel.version()}", 2 * len(tables) * len(tokens), "size")
        for path, together in tables.items():
            began = time.monotonic()
            timings: dict[RankShape, dict[int, Timing]] = {shape: {} for shape in together}
            for count, found in tune_shapes(kernel, engine, together, tokens, pool):
                for shape, timing in zip(together, found, strict=True):
                    timings[shape][count] = timing
                write_durably(path, dump_table(timings[together[0]]).encode())
                kept = record(folder, str(path.relative_to(folder)), _head(kernel), timings)
                write_durably(folder / MEASURED, kept.encode())
                progress.advance()
            seconds = f"{time.monotonic() - began:.0f} s"
            for shape in together:
                written.append(WrittenTable(path, shape, timings[shape]))
                progress.note(f"{shape}: {written[-1].gain:.2f} times as fast as by default ({seconds})")
    return written


def tune_shapes(
    kernel: Kernel, engine: str, shapes: Sequence[RankShape], tokens: Sequence[int], pool: Executor | None = None
) -> Iterator[tuple[int, Timings]]:
    """Each number of tokens twice: with the fastest tile so far, and with the fastest.

    All numbers are searched together: they share most tiles, and few compile at a time for one.

    Args:
        kernel: the engine's kernel.
        engine: its name, by which processes of the pool find it.
        shapes: the experts of a rank; several where they share a table.
        tokens: numbers of tokens.
        pool: processes that compile.
    """
    import torch

    from quarkconv.kernels.backend import device_traits
    from quarkconv.kernels.tune import make_weights

    device = torch.device("cuda", torch.cuda.current_device())
    shared = device_traits(device).shared_memory
    weights = [make_weights(shape.sizes, device) for shape in shapes]
    run = map if pool is None else pool.map

    def launches(pairs: Sequence[tuple[int, Tile]]) -> list[bool]:
        once = {tile: count for count, tile in reversed(pairs)}
        list(run(partial(_compiles, engine, shapes[0]), once.values(), once))  # no tile by two processes at a time
        counts, tiles = [count for count, _ in pairs], [tile for _, tile in pairs]
        works = [run(partial(_compiles, engine, shape), counts, tiles) for shape in shapes]
        return [all(each) for each in zip(*works, strict=True)]

    searches = {count: _search(kernel, shapes, count, weights, shared) for count in tokens}
    yield from run_together(searches, launches)
    torch.cuda.empty_cache()


def _search(
    kernel: Kernel, shapes: Sequence[RankShape], tokens: int, weights: Sequence[Weights], shared: int
) -> Search:
    """The search for a number of tokens."""
    from quarkconv.kernels.tune import time_calls

    count = max(1, min(_MAX_INPUTS, _MAX_INPUT_TOKENS // tokens))
    forwards = [
        kernel.forwards(shape, each, [_routed(shape, tokens) for _ in range(count)])
        for shape, each in zip(shapes, weights, strict=True)
    ]

    def measure(tile: Tile, repeats: int) -> tuple[float, ...]:
        with kernel.using(tile):
            return tuple(time_calls(each, repeats) for each in forwards)

    def each_of(tiles: Callable[[RankShape], list[Tile]]) -> list[Tile]:
        return [tile for shape in shapes for tile in tiles(shape)]

    return search(
        [kernel.default(shape, tokens) for shape in shapes],
        each_of(lambda shape: starts(shape, tokens, shared)),
        lambda tile: each_of(lambda shape: variations(tile, shape, tokens, shared)),
        measure,
    )


def _import(engine: str) -> None:
    """Import an engine in a process of the pool."""
    engine_kernel(engine)


def _compiles(engine: str, shape: RankShape, tokens: int, tile: Tile) -> bool:
    """Compile a tile into Triton's cache by a forward; False where the GPU cannot launch it."""
    kernel, weights = _small(engine, shape)
    [forward] = kernel.forwards(shape, weights, [_routed(shape, tokens)])
    with suppress(_out_of_resources()), kernel.using(tile):
        forward()
        return True
    return False


@lru_cache(maxsize=1)
def _small(engine: str, shape: RankShape) -> tuple[Kernel, Weights]:
    """The kernel of an engine, and weights in which all experts are one, where it takes them; one shape at a time.

    The number of experts must be that of the shape: by it vLLM chooses how it assigns blocks, and Triton specializes on
    whether the number of padded rows is a multiple of 16. With another, the process that times would compile again.
    """
    import torch

    from quarkconv.kernels.tune import make_weights

    kernel, device = engine_kernel(engine), torch.device("cuda", torch.cuda.current_device())
    if kernel.needs_contiguous_weights:
        return kernel, make_weights(shape.sizes, device)
    one = make_weights((1, *shape.sizes[1:]), device)
    w13, w2, w13_scale, w2_scale = (tensor.expand(shape.experts, -1, -1) for tensor in one)
    return kernel, (w13, w2, w13_scale, w2_scale)


def _out_of_resources() -> type[Exception]:
    from triton.runtime.errors import OutOfResources

    error: type[Exception] = OutOfResources
    return error


def _routed(shape: RankShape, tokens: int) -> Routed:
    """A random input whose tokens choose among the experts of all ranks, each as often as the others."""
    import torch

    logits = torch.randn((tokens, shape.all_experts), device="cuda")
    weights, ids = torch.softmax(logits, -1).topk(shape.top_k, -1)
    states = torch.randn((tokens, shape.hidden), device="cuda", dtype=torch.bfloat16)
    return Routed(states, weights.contiguous(), ids.int().contiguous())


def _head(kernel: Kernel) -> dict[str, str]:
    """What a measurement is of, by what, when, and with which versions."""
    import torch
    import triton

    return {
        "by": "quarkconv tune",
        "engine": kernel.version(),
        "device": torch.cuda.get_device_name(),
        "date": datetime.date.today().isoformat(),
        "torch": str(torch.__version__),
        "triton": str(triton.__version__),
    }


def tune_quarkconv(
    shapes: Sequence[RankShape], out: Path | None, *, tokens: Sequence[int] = TOKENS, jobs: int = 1
) -> list[WrittenTable]:
    """Write the table of quarkconv's own kernels: one file a device, beside the kernels or at ``out``.

    Raises:
        UnsupportedError: there is no GPU.
    """
    require_gpu()
    from quarkconv.kernels.tune import tune_table

    path = tune_table([shape.sizes for shape in shapes], tokens, jobs, out)
    return [WrittenTable(path, shape, {}) for shape in shapes]


def named_shapes(names: Iterable[str] | None) -> tuple[RankShape, ...]:
    """Shapes by name, or as ``E,K,H,I``; None for those that quarkconv's own tables have.

    Raises:
        UsageError: the name is unknown.
    """
    from quarkconv.kernels.tune import EXPERTS_IN_ALL, NAMED, SHAPES, parse_shape

    chosen = list(SHAPES if names is None else names)
    try:
        sizes = [parse_shape(name) for name in chosen]
    except ValueError as error:
        raise UsageError(
            "Invalid --shape",
            expected=f"positive sizes E,K,H,I with K at most E, or {alternatives(NAMED)}",
            found=" and ".join(chosen),
        ) from error
    return tuple(RankShape(*size, EXPERTS_IN_ALL.get(size, size[0])) for size in sizes)
