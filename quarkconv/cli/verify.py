"""``quarkconv verify``."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Final

import typer

from quarkconv.cli.options import Device, Json, Model, Quiet, Ray, Report, Verbose, parse_layers
from quarkconv.cli.out import open_output
from quarkconv.cli.progress import progress
from quarkconv.cli.reports import command_line, require_report, write_report
from quarkconv.errors import QuarkconvError, UsageError
from quarkconv.plan.shares import parse_share

if TYPE_CHECKING:
    from rich.console import RenderableType

_MAX_DIGITS: Final = 9
_TOKENS: Final = "64"
"""Tokens where ``--tokens`` is left out."""


def _complete_layers(context: typer.Context, incomplete: str) -> list[str]:
    """The model's MoE layers, after the part of the list that has been typed: numbers, or modules where shared."""
    model = Path(str(context.params.get("model") or "."))
    if not model.is_dir():
        return []
    from quarkconv.description.description import describe

    try:
        layers = describe(model).int8_layers
    except QuarkconvError:
        return []
    typed = incomplete[: max(incomplete.rfind(","), incomplete.rfind("-")) + 1]
    unique = len({layer.index for layer in layers}) == len(layers)
    names = [f"{typed}{layer.index if unique else layer.moe}" for layer in layers]
    whole = [f"{layers[0].index}-{layers[-1].index}"] if unique and len(layers) > 1 and not typed else []
    return [name for name in [*whole, *names] if name.startswith(incomplete)]


def verify(
    model: Model = ".",
    source: Annotated[
        str | None,
        typer.Option("--source", metavar="DIR", help="The source of the conversion, to compare byte by byte."),
    ] = None,
    unquantized: Annotated[
        str | None,
        typer.Option("--unquantized", metavar="DIR", help="The model before quantization, to measure the loss."),
    ] = None,
    device: Device = "auto",
    layers: Annotated[
        str | None,
        typer.Option(
            "--layers",
            metavar="0,3-5",
            help="MoE layers whose numbers are checked, by number or module. [default: all]",
            autocompletion=_complete_layers,
        ),
    ] = None,
    tokens: Annotated[
        str | None,
        typer.Option(
            "--tokens", metavar="N[,N]", help="Tokens per layer; several numbers are checked in turn. [default: 64]"
        ),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", metavar="N", help="Seed of the random tokens. [default: 0]")
    ] = None,
    activations: Annotated[
        str | None,
        typer.Option(
            "--activations", metavar="FILE.safetensors", help="Recorded hidden states, instead of random ones."
        ),
    ] = None,
    bytes_only: Annotated[bool, typer.Option("--bytes-only", help="Check structure and bytes.")] = False,
    numbers_only: Annotated[bool, typer.Option("--numbers-only", help="Check structure and numbers.")] = False,
    fail_fast: Annotated[bool, typer.Option("--fail-fast", help="Stop at the first problem.")] = False,
    part: Annotated[
        str | None,
        typer.Option("--part", metavar="K/N", help="Check part K of N; `quarkconv merge` merges what --json prints."),
    ] = None,
    ray: Ray = None,
    report: Report = None,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Prove a checkpoint: its structure, every byte, and the numbers of the INT8 forward.

    Takes converted checkpoints and Quark exports. Exits 1 when anything is wrong.

    \b
    quarkconv verify ./model-fused-int8 --source ./model
    quarkconv verify ./model --unquantized org/original --layers 0,3-5
    """
    output = open_output(json=json, verbose=verbose, quiet=quiet)
    of_numbers = {
        "--unquantized": unquantized,
        "--layers": layers,
        "--tokens": tokens,
        "--seed": seed,
        "--activations": activations,
    }
    stages = _stages(of_numbers, bytes_only=bytes_only, numbers_only=numbers_only)
    chosen = None if layers is None else parse_layers(layers)
    counts = parse_tokens(_TOKENS if tokens is None else tokens)
    share = None if part is None else parse_share(part)
    if share is not None and ray is not None:
        raise UsageError("--part and --ray exclude one another", expected="one of them", found="both")
    require_report(report)
    with progress("Starting", shown=output.shows_progress) as meter:
        from quarkconv.verify.verify import verify_checkpoint  # imports torch, which takes a while

        verify_by = verify_checkpoint
        if ray is not None:
            from quarkconv.verify.on_ray import verify_on_ray

            verify_by = partial(verify_on_ray, address=ray)
        verification = verify_by(
            model,
            source,
            device,
            layers=chosen,
            tokens=counts,
            seed=seed or 0,
            unquantized=unquantized,
            activations=activations,
            stages=stages,
            fail_fast=fail_fast,
            share=share,
            progress=meter,
        )
    if report is not None:
        from quarkconv.report.verification import verification_report

        write_report(report, verification_report(verification, command_line()))

    def render() -> RenderableType:
        from quarkconv.cli.render.verification import render_verification

        return render_verification(verification)

    output.show(verification.to_json(), render)
    return 0 if verification.ok else 1


def _stages(of_numbers: Mapping[str, object], *, bytes_only: bool, numbers_only: bool) -> list[str]:
    """What is checked beside the structure.

    Args:
        of_numbers: the options that concern numbers alone, with their values; None for one that is not given.
        bytes_only, numbers_only: the options of these names.

    Raises:
        UsageError: options contradict one another, or have no effect.
    """
    if bytes_only and numbers_only:
        raise UsageError("Nothing is left to check", expected="--bytes-only or --numbers-only", found="both")
    given = next((option for option, value in of_numbers.items() if value is not None), None)
    if bytes_only and given is not None:
        raise UsageError(
            f"{given} has no effect with --bytes-only",
            expected="one of them",
            hint=f"leave out --bytes-only or {given}",
        )
    return [stage for stage, left_out in (("bytes", numbers_only), ("numbers", bytes_only)) if not left_out]


def parse_tokens(text: str) -> list[int]:
    """Numbers of tokens from ``64,1024``.

    Raises:
        UsageError: it is not such a list.
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and len(part) <= _MAX_DIGITS for part in parts):
        raise UsageError("Invalid --tokens", expected="numbers such as 64 or 16,1024", found=repr(text))
    return [int(part) for part in parts]
