"""``quarkconv convert``."""

from __future__ import annotations

import time
from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Final

import typer

from quarkconv.cli.options import Json, Model, Quiet, Ray, Verbose, choice
from quarkconv.cli.out import open_output
from quarkconv.cli.progress import progress
from quarkconv.convert.jobs import DEFAULT_JOBS, MAX_JOBS
from quarkconv.convert.shard_size import DEFAULT_SHARD_SIZE
from quarkconv.errors import UsageError
from quarkconv.plan.shares import parse_share
from quarkconv.scheme.options import KEEP
from quarkconv.targets import TARGETS, get_target
from quarkconv.text import alternatives
from quarkconv.write.modes import Finish, Join, Mode, OnRay, Whole

if TYPE_CHECKING:
    from rich.console import RenderableType

_FEW_BYTES: Final = 1000
_FOR_ENGINES: Final = "give --to fused-int8 for vLLM, --to w8a8-int8 for SGLang; `quarkconv inspect` shows all engines"


class QuantizeMode(StrEnum):
    """Which float modules ``--quantize`` takes."""

    MISSING = "missing"
    ALL = "all"


def _complete_targets(incomplete: str) -> list[tuple[str, str]]:
    return [(name, target.summary) for name, target in TARGETS.items() if name.startswith(incomplete)]


def convert(
    to: Annotated[
        str | None,
        typer.Option(
            "--to", metavar="TARGET", help=f"{' | '.join(TARGETS)}  [required]", autocompletion=_complete_targets
        ),
    ] = None,
    model: Model = ".",
    out: Annotated[
        str | None,
        typer.Option(
            "--out", metavar="DIR", help="Output directory, or s3://, gs://, az:// URL. [default: <model>-<target>]"
        ),
    ] = None,
    max_shard_size: Annotated[
        str, typer.Option("--max-shard-size", metavar="SIZE", help="Largest shard, such as 5GB or 512MiB.")
    ] = DEFAULT_SHARD_SIZE,
    jobs: Annotated[
        int, typer.Option("--jobs", min=1, max=MAX_JOBS, metavar="N", help="Threads that read and write.")
    ] = DEFAULT_JOBS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the plan and write nothing.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace an earlier conversion in DIR.")] = False,
    tp: Annotated[
        int | None, typer.Option("--tp", min=2, metavar="N", help="Divide experts among N tensor parallel ranks.")
    ] = None,
    ep: Annotated[
        int | None, typer.Option("--ep", min=2, metavar="N", help="Divide experts among N expert parallel ranks.")
    ] = None,
    quantize: Annotated[
        QuantizeMode | None,
        typer.Option(
            "--quantize",
            metavar="missing|all",
            help="Quantize float modules to ptpc_int8: those that the config declares, or every linear.",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude",
            metavar="PATTERN",
            help="Modules that --quantize leaves in float: a name, a pattern with *, or re:REGEX. Repeatable.",
        ),
    ] = None,
    scheme: Annotated[
        str | None, typer.Option("--scheme", metavar="NAME", help="Scheme of int8 weights without a config: ptpc_int8.")
    ] = None,
    part: Annotated[
        str | None, typer.Option("--part", metavar="K/N", help="Write part K of N; run each part on any machine.")
    ] = None,
    join: Annotated[
        bool,
        typer.Option("--join", help="Share the work with other processes that run --join; they may come and go."),
    ] = False,
    ray: Ray = None,
    finish: Annotated[
        bool, typer.Option("--finish", help="Finish an output whose parts are all written, if no part finished it.")
    ] = False,
    mtp: Annotated[
        str, choice("--mtp", "keep", "drop", "quantize", help="What to do with multi-token prediction layers.")
    ] = KEEP,
    cache: Annotated[
        bool, typer.Option("--cache", help="Download a model to the Hub's cache instead of streaming it.")
    ] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Upload the output to this repo on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repo that --push creates private.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Rewrite a checkpoint for an engine.

    Exact and in constant memory. The source is only read. After an interrupt or a full disk, the same command resumes.

    \b
    quarkconv convert ./model --to fused-int8
    quarkconv convert org/name@revision --to compressed-tensors --out ./converted
    quarkconv convert ./model --to fused-int8 --tp 8 --dry-run
    quarkconv convert ./model --to fused-int8 --part 3/8
    quarkconv convert ./model --to fused-int8 --out s3://bucket/path --join
    quarkconv convert ./model --to w8a8-int8 --push org/name-w8a8-int8
    """
    from quarkconv.convert.conversion import Conversion
    from quarkconv.convert.options import Options
    from quarkconv.hub.push import create_repo, upload_folder

    output = open_output(json=json, verbose=verbose, quiet=quiet)
    if to is None:
        raise UsageError("--to is missing", expected=alternatives(TARGETS), hint=_FOR_ENGINES)
    get_target(to)  # a wrong name fails before the model is located
    _require_unit(max_shard_size)
    mode = _mode(
        part=part, join=join, ray=ray, finish=finish, overwrite=overwrite, push=push, private=private, dry_run=dry_run
    )
    options = Options(
        max_shard_size=max_shard_size,
        tp=tp or 1,
        ep=ep or 1,
        quantize=None if quantize is None else quantize.value,
        exclude=exclude or (),
        scheme=scheme,
        mtp=mtp,
    )
    with progress("Reading", shown=output.shows_progress) as meter:
        conversion = Conversion.prepare(model, to, out, options, cache=cache, push=push, progress=meter)
    value, seconds = conversion.to_json(mode, dry_run=dry_run), None
    if not dry_run:
        started = time.perf_counter()
        with progress("Converting", shown=output.shows_progress) as meter:
            if push is not None:  # a refusal should come before the conversion
                create_repo(push, private=private, progress=meter)
            outcome = conversion.carry_out(mode, jobs=jobs, progress=meter)
        value |= outcome.to_json()
        if push is not None and (result := outcome.result) is not None:
            value["pushed"] = upload_folder(result.output, push, result.commit_message, bars=output.shows_progress)
        seconds = time.perf_counter() - started

    def render() -> RenderableType:
        from quarkconv.cli.render.conversion import render_conversion

        return render_conversion(value, seconds)

    output.show(value, render)
    return 0


def _require_unit(size: str) -> None:
    """Refuse a shard size that is a few bytes: each tensor would become a file.

    Raises:
        UsageError: it is a small number without a unit.
    """
    if size.isdecimal() and 0 < int(size) < _FEW_BYTES:
        raise UsageError(
            "Invalid --max-shard-size",
            expected="a size with its unit, such as 5GB",
            found=f"{size} (bytes)",
        )


def _mode(
    *,
    part: str | None,
    join: bool,
    ray: str | None,
    finish: bool,
    overwrite: bool,
    push: str | None,
    private: bool,
    dry_run: bool,
) -> Mode:
    """How this process carries the conversion out.

    Raises:
        UsageError: options contradict one another.
    """
    if private and push is None:
        raise UsageError("--private has no effect without --push", expected="--push ORG/NAME as well")
    chosen: dict[str, Mode] = {}
    if part is not None:
        chosen["--part"] = parse_share(part)
    if join:
        chosen["--join"] = Join()
    if ray is not None:
        chosen["--ray"] = OnRay(ray)
    if finish:
        chosen["--finish"] = Finish()
    if not chosen:
        return Whole(overwrite, keep=push is not None)  # the upload may have failed
    if len(chosen) > 1:
        raise _excluded(*chosen)
    [(option, mode)] = chosen.items()
    if overwrite:
        raise _excluded(option, "--overwrite", hint="delete the output to start a conversion in parts over")
    if push is not None and not finish:
        raise _excluded(option, "--push", hint="run --finish --push when all parts are written")
    if dry_run and finish:
        raise _excluded(option, "--dry-run")
    return mode


def _excluded(*options: str, hint: str | None = None) -> UsageError:
    return UsageError(f"{' and '.join(options)} exclude one another", expected="one of them", found="both", hint=hint)
