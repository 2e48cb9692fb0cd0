"""``quarkconv evaluate``."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated

import typer

from quarkconv.cli.options import Device, Json, Model, Quiet, Report, Verbose, parse_layer_numbers
from quarkconv.cli.out import open_output
from quarkconv.cli.progress import progress
from quarkconv.cli.reports import command_line, require_report, write_report
from quarkconv.errors import interrupted
from quarkconv.evaluate.request import DEFAULT_WINDOW, Limits, require_one_source

if TYPE_CHECKING:
    from rich.console import RenderableType


def evaluate(
    model: Model = ".",
    unquantized: Annotated[
        str | None, typer.Option("--unquantized", metavar="DIR", help="The model before quantization.")
    ] = None,
    text: Annotated[str | None, typer.Option("--text", metavar="FILE", help="UTF-8 text file to evaluate on.")] = None,
    token_ids: Annotated[
        str | None,
        typer.Option("--token-ids", metavar="FILE", help="A safetensors file with token_ids int64 [windows, window]."),
    ] = None,
    window: Annotated[int, typer.Option("--window", min=4, metavar="N", help="Tokens per window.")] = DEFAULT_WINDOW,
    windows: Annotated[
        int | None, typer.Option("--windows", min=1, metavar="N", help="Windows to evaluate. [default: all]")
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch",
            min=1,
            metavar="N",
            help="Windows that run together. [default: 4096 tokens, up to 32768 on a GPU]",
        ),
    ] = None,
    device: Device = "auto",
    layers: Annotated[
        str | None,
        typer.Option("--layers", metavar="0,3-5", help="Layers that run in INT8; the others run dequantized."),
    ] = None,
    ablate: Annotated[
        int,
        typer.Option(
            "--ablate", min=0, metavar="N", help="Leave each of the N worst layers and experts unquantized, in turn."
        ),
    ] = 0,
    max_kl: Annotated[
        float | None,
        typer.Option("--max-kl", metavar="X", help="Exit 1 when the mean KL divergence is larger, in nats."),
    ] = None,
    min_agreement: Annotated[
        float | None,
        typer.Option("--min-agreement", metavar="X", help="Exit 1 when top-1 agreement, 0 to 1, is smaller."),
    ] = None,
    record: Annotated[
        str | None,
        typer.Option("--record", metavar="FILE", help="Write the inputs of MoE layers, for verify --activations."),
    ] = None,
    report: Report = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Keep finished layers on disk, and resume from them.")
    ] = True,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Measure what quantization costs the whole model on real text.

    One decoder layer is in memory at a time. Exits 1 when --max-kl or --min-agreement is exceeded.

    \b
    quarkconv evaluate ./model --unquantized ./original --text wiki.txt
    quarkconv evaluate ./model --text wiki.txt --window 512 --windows 20 --json
    """
    output = open_output(json=json, verbose=verbose, quiet=quiet)
    require_one_source(text, token_ids)
    require_report(report)
    limits = Limits(max_kl, min_agreement)
    numbers = None if layers is None else parse_layer_numbers(layers)
    with progress("Starting", shown=output.shows_progress) as meter, _resuming(resume):
        from quarkconv.evaluate.evaluation import evaluate_checkpoint  # imports torch and transformers

        evaluation = evaluate_checkpoint(
            model,
            unquantized,
            text=text,
            token_ids=token_ids,
            window=window,
            windows=windows,
            batch=batch,
            device=device,
            layers=numbers,
            ablate=ablate,
            record=record,
            limits=limits,
            resume=resume,
            progress=meter,
        )

    if report is not None:
        from quarkconv.report.evaluation import evaluation_report

        write_report(report, evaluation_report(evaluation, command_line()))

    def render() -> RenderableType:
        from quarkconv.cli.render.evaluation import render_evaluation

        return render_evaluation(evaluation)

    output.show(evaluation.to_json(), render)
    return 0 if evaluation.ok else 1


@contextmanager
def _resuming(resume: bool) -> Iterator[None]:
    """Say of an interrupt that finished layers are kept, where they are."""
    try:
        yield
    except KeyboardInterrupt:
        if resume:
            raise interrupted() from None
        raise
