"""``quarkconv convert``."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from quarkconv.cli.options import Json, Model, Quiet, Verbose
from quarkconv.cli.out import console, print_json, set_talk, talkative
from quarkconv.cli.progress import progress
from quarkconv.convert.conversion import (
    DEFAULT_JOBS,
    DEFAULT_SHARD_SIZE,
    MAX_JOBS,
    finished_conversion,
    output_directory,
    plan_conversion,
    plan_summary,
    repo_id,
    run_plan,
)
from quarkconv.errors import UsageError
from quarkconv.hub.locate import locate_model
from quarkconv.hub.push import prepare_push, push_folder
from quarkconv.targets import TARGETS, get_target


def _complete_targets(incomplete: str) -> list[tuple[str, str]]:
    return [(name, target.summary) for name, target in TARGETS.items() if name.startswith(incomplete)]


def convert(
    to: Annotated[
        str,
        typer.Option("--to", metavar="TARGET", help=" | ".join(TARGETS), autocompletion=_complete_targets),
    ],
    model: Model = ".",
    out: Annotated[
        str | None, typer.Option("--out", metavar="DIR", help="Output directory. [default: <model>-<target>]")
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
    cache: Annotated[
        bool, typer.Option("--cache", help="Download a model on the Hub to its cache rather than stream it.")
    ] = False,
    push: Annotated[
        str | None, typer.Option("--push", metavar="ORG/NAME", help="Then upload the output to this repo on the Hub.")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repo of --push private.")] = False,
    verbose: Verbose = False,
    quiet: Quiet = False,
    json: Json = False,
) -> int:
    """Rewrite a checkpoint for an engine: bit-exact, in constant memory, resumable.

    The source is only read. Interrupted or out of space, the same command resumes.
    """
    set_talk(verbose=verbose, quiet=quiet)
    get_target(to)  # a wrong name is told before a model is downloaded
    if tp is not None or ep is not None:
        from quarkconv.cli.convert_by_rank import convert_by_rank

        if push is not None:
            raise UsageError("Folders by rank are not uploaded", expected="--push without --tp and --ep", found="both",
                             hint="engines load whole models; upload one of those")  # fmt: skip
        return convert_by_rank(model, to, out, max_shard_size, jobs, dry_run, overwrite, cache, tp, ep, json)
    with progress("Reading") as meter:
        source = locate_model(model, cache=cache, reading=meter.reading)
        output = output_directory(source, model, to, out)
        base_model = repo_id(model, source)
        plan = plan_conversion(source, to, max_shard_size=max_shard_size, base_model=base_model, reading=meter.reading)
    if dry_run:
        summary = {**plan_summary(plan, source, output), "dry_run": True}
        if json:
            print_json(summary)
        else:
            from quarkconv.cli.render.conversion import render_summary

            console().print(render_summary(summary, plan.losses))
        return 0
    if push is not None:
        with progress("Asking the Hub"):
            prepare_push(push, private=private)
    started = time.perf_counter()
    done = None if push is None or overwrite else finished_conversion(plan, source, output)
    if done is not None:
        result = done
    else:
        with progress("Converting") as meter:
            meter.step(f"Converting to {to}", plan.output_bytes, "byte")
            result = run_plan(plan, source, output, jobs, overwrite, meter.advance)
    pushed = None
    if push is not None:
        message = f"{to} by quarkconv, plan {result.manifest.plan[:12]}"
        pushed = push_folder(output, push, message, bars=talkative())
    if json:
        print_json({**result.to_json(), **({} if pushed is None else {"pushed": pushed})})
    else:
        from quarkconv.cli.render.conversion import render_result

        console().print(render_result(result.to_json(), plan.losses, time.perf_counter() - started))
        if pushed is not None:
            console().print(f"  uploaded: {pushed}", style="dim", markup=False, soft_wrap=True)
    return 0
