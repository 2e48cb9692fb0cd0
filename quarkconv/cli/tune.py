"""``quarkconv tune``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from quarkconv.cli.options import Json, Quiet, Verbose, choice
from quarkconv.cli.out import open_output, whole_line
from quarkconv.cli.progress import progress
from quarkconv.errors import UsageError
from quarkconv.text import alternatives

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quarkconv.progress import Progress
    from quarkconv.tune.shapes import RankShape

_QUARKCONV = "quarkconv"


def tune(
    engine: Annotated[str, choice("--for", "quarkconv", "vllm", "sglang", help="Whose kernel to time.")] = _QUARKCONV,
    model: Annotated[
        str | None, typer.Option("--model", metavar="MODEL", help="Checkpoint whose experts to tune for.")
    ] = None,
    tp: Annotated[int, typer.Option("--tp", metavar="N", help="Tensor parallel size.")] = 1,
    ep: Annotated[int, typer.Option("--ep", metavar="N", help="Expert parallel size.")] = 1,
    shapes: Annotated[
        list[str] | None,
        typer.Option("--shape", metavar="NAME|E,K,H,I", help="Sizes instead of a model; repeatable."),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens", metavar="1,64,..", help="Numbers of tokens to tune for. [default: powers of 2 to 4096]"
        ),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option("--jobs", min=1, metavar="N", help="Processes that compile. [default: cores, up to 16]"),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="PATH", help="Folder of an engine's tables, or file of quarkconv's table."),
    ] = None,
    print_folder: Annotated[
        bool, typer.Option("--print-folder", help="Print the folder of quarkconv's own tables, and stop.")
    ] = False,
    json: Json = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
) -> int:
    """Measure the fastest launch options on this GPU.

    With --for, times the engine's own INT8 kernel, and writes the tables that the engine reads.

    \b
    quarkconv tune --for vllm --model org/name --tp 4 --out ./tables
    VLLM_TUNED_CONFIG_FOLDER=./tables vllm serve org/name --tensor-parallel-size 4
    """
    from quarkconv.tune.kernels import ENGINES, require_engine
    from quarkconv.tune.tables import shipped_folder

    if engine not in (_QUARKCONV, *ENGINES):
        raise UsageError("Unknown engine", expected=alternatives((_QUARKCONV, *ENGINES)), found=engine)
    output = open_output(json=json, verbose=verbose, quiet=quiet)
    if print_folder:
        folder = str(shipped_folder(engine))
        output.show({"schema": "quarkconv.tune/1", "engine": engine, "folder": folder}, lambda: whole_line(folder))
        return 0
    from quarkconv.tune.tune import TOKENS, tune_engine, tune_quarkconv

    counts = TOKENS if tokens is None else parse_tokens(tokens)
    processes = jobs or min(os.cpu_count() or 1, 16)
    with progress("Reading", shown=output.shows_progress) as meter:
        chosen = _shapes(model, shapes, tp, ep, meter)
        if engine == _QUARKCONV:
            tables = tune_quarkconv(chosen, out, tokens=counts, jobs=processes)
        else:
            require_engine(engine)
            out = out or Path(f"{engine}-tables")
            tables = tune_engine(engine, chosen, out, tokens=counts, jobs=processes, progress=meter)

    def render() -> RenderableType:
        from quarkconv.cli.render.tune import render_tables

        return render_tables(engine, out, tables)

    output.show(
        {"schema": "quarkconv.tune/1", "engine": engine, "tables": [table.to_json() for table in tables]}, render
    )
    return 0


def parse_tokens(text: str) -> tuple[int, ...]:
    """Numbers of tokens, ascending.

    Raises:
        UsageError: one is not a positive number.
    """
    parts = text.split(",")
    if not all(part.isascii() and part.isdigit() and 0 < int(part) <= 2**20 for part in parts):
        raise UsageError("Invalid --tokens", expected="numbers such as 1,64,4096", found=repr(text))
    return tuple(sorted(set(map(int, parts))))


def _shapes(model: str | None, names: list[str] | None, tp: int, ep: int, meter: Progress) -> tuple[RankShape, ...]:
    """The shapes of a model, or those named; without either, those that quarkconv's own tables have."""
    from quarkconv.tune.shapes import checkpoint_shapes

    if model is not None and names is not None:
        raise UsageError("Give either a model or shapes", expected="--model or --shape", found="both")
    if model is not None:
        return checkpoint_shapes(model, tp, ep, meter)
    if (tp, ep) != (1, 1):
        raise UsageError("--tp and --ep divide the experts of a model", expected="--model", found="no model")
    from quarkconv.tune.tune import named_shapes

    return named_shapes(names)
