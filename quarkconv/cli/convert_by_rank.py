"""``quarkconv convert --tp N`` and ``--ep N``."""

from __future__ import annotations

import time

from quarkconv.cli.out import console, print_json
from quarkconv.cli.progress import progress
from quarkconv.convert import ranks as by_rank
from quarkconv.errors import UsageError


def convert_by_rank(
    model: str,
    target: str,
    out: str | None,
    max_shard_size: str,
    jobs: int,
    dry_run: bool,
    overwrite: bool,
    cache: bool,
    tp: int | None,
    ep: int | None,
    json: bool,
) -> int:
    """Write a folder for each rank. The arguments are the options of ``convert``."""
    if tp is not None and ep is not None:
        raise UsageError("Experts are divided in one way", expected="--tp or --ep", found="both")
    parallel, world_size = ("tp", tp) if tp is not None else ("ep", ep)
    with progress("Reading") as meter:
        conversion = by_rank.plan_by_rank(
            model, target, out, parallel=parallel, world_size=world_size or 1, max_shard_size=max_shard_size,
            cache=cache, reading=meter.reading,
        )  # fmt: skip
    started = time.perf_counter()
    if not dry_run:
        with progress("Converting") as meter:
            meter.step(f"Converting to {target} by rank", conversion.output_bytes, "byte")
            by_rank.convert_by_rank(conversion, jobs=jobs, overwrite=overwrite, progress=meter.advance)
    if json:
        print_json(conversion.to_json(dry_run=dry_run))
    else:
        from quarkconv.cli.render.conversion import render_ranks

        seconds = None if dry_run else time.perf_counter() - started
        console().print(render_ranks(conversion, seconds))
    return 0
