"""How ``convert`` looks in a terminal."""

from __future__ import annotations

import shlex
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import printable, verdict
from quarkconv.cli.render.findings import render_findings
from quarkconv.convert.conversion import place_of
from quarkconv.convert.ranks import RankConversion
from quarkconv.findings import Finding
from quarkconv.text import plural, size


def render_summary(summary: dict[str, Any], losses: tuple[Finding, ...]) -> RenderableType:
    """A plan before it is carried out."""
    return Group(_table(summary), *render_findings(losses), Text("Nothing was written (--dry-run).", style="dim"))


def render_result(result: dict[str, Any], losses: tuple[Finding, ...], seconds: float) -> RenderableType:
    """A finished conversion."""
    closing = verdict(f"Converted to {result['target']} in {seconds:.1f} s", good=True)
    output = printable(shlex.quote(result["output"]))
    next_step = Text.assemble(("  prove it: ", "dim"), (f"quarkconv verify {output}", "cyan"))
    return Group(_table(result), *render_findings(losses), closing, next_step)


def render_ranks(conversion: RankConversion, seconds: float | None) -> RenderableType:
    """A conversion by rank: planned when ``seconds`` is None, else finished."""
    first = conversion.plans[0]
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("source", Text(f"{printable(str(place_of(conversion.source)))} ({first.scheme})"))
    table.add_row("output", Text(printable(str(conversion.output))))
    for rank, plan in zip(conversion.ranks, conversion.plans, strict=True):
        moe = plan.moe
        held = f"{moe.experts} experts, H {moe.hidden_size}, I {moe.intermediate_size}"
        table.add_row(rank.folder(), f"{held}, {plural(len(plan.shards), 'shard')}, {size(plan.output_bytes)}")
    if seconds is None:
        return Group(table, *render_findings(first.losses), Text("Nothing was written (--dry-run).", style="dim"))
    closing = verdict(f"Converted to {first.target} for {len(conversion.plans)} ranks in {seconds:.1f} s", good=True)
    return Group(table, *render_findings(first.losses), closing)


def _table(summary: dict[str, Any]) -> Table:
    moe = summary["moe"]
    sizes = f"H {moe['hidden_size']}, I {moe['intermediate_size']}"
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    table.add_row("source", Text(f"{printable(summary['source'])} ({summary['scheme']})"))
    table.add_row("output", Text(printable(summary["output"])))
    table.add_row("experts", f"{len(moe['layers'])} layers x {moe['experts']} experts, {sizes}")
    table.add_row(
        "tensors", f"{summary['tensors']:,} from {summary['pieces']:,} pieces, in {plural(summary['shards'], 'shard')}"
    )
    table.add_row("on disk", size(summary["bytes"]))
    return table
