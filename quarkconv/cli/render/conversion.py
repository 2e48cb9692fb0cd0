"""The output of ``convert`` in a terminal."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quarkconv.cli.out import printable, verdict
from quarkconv.cli.render.findings import render_findings
from quarkconv.findings import finding_from_json
from quarkconv.text import plural, size


def render_conversion(value: dict[str, Any], seconds: float | None) -> RenderableType:
    """A conversion.

    Args:
        value: the conversion as JSON.
        seconds: how long it took; None where nothing was written.
    """
    by_rank = "ranks" in value
    table = _ranks_table(value) if by_rank else _table(value)
    if seconds is None:
        closing = [Text("Nothing was written (--dry-run).", style="dim")]
    elif not value.get("finished", True) and "joined" in value:
        amount = f"{plural(value['joined']['shards'], 'shard')}, {size(value['joined']['bytes'])}"
        closing = [
            verdict(f"{amount} written in {seconds:.1f} s", good=True),
            Text("  another worker finishes the conversion", style="dim"),
        ]
    elif not value.get("finished", True):
        part = value["part"]
        closing = [
            verdict(f"Part {part['number']} of {part['count']} written in {seconds:.1f} s", good=True),
            Text("  other parts are missing; the last one finishes the conversion", style="dim"),
        ]
    else:
        ranks = f" for {len(value['ranks'])} ranks" if by_rank else ""
        closing = [verdict(f"Converted to {value['target']}{ranks} in {seconds:.1f} s", good=True)]
        if not by_rank:
            command = shlex.join(["quarkconv", "verify", value["output"], "--source", value["source"]])
            proof = Text.assemble(("  prove it: ", "dim"), (printable(command), "cyan"))
            proof.no_wrap, proof.overflow = True, "ignore"
            closing.append(proof)
        if "pushed" in value:
            url = f"  uploaded: {printable(value['pushed'])}"
            closing.append(Text(url, style="dim", no_wrap=True, overflow="ignore"))
    return Group(table, *render_findings(map(finding_from_json, value["findings"])), *closing)


def _table(value: dict[str, Any]) -> Table:
    moe = value["moe"]
    table = _head(value)
    if moe is None:
        table.add_row("experts", "not recognised")
    else:
        sizes = f"H {moe['hidden_size']}, I {moe['intermediate_size']}"
        table.add_row("experts", f"{len(moe['layers'])} layers x {moe['experts']} experts, {sizes}")
    table.add_row(
        "tensors", f"{value['tensors']:,} from {value['pieces']:,} pieces, in {plural(value['shards'], 'shard')}"
    )
    table.add_row("on disk", size(value["bytes"]))
    if "part" in value:
        part = value["part"]
        amount = f"{plural(part['shards'], 'shard')}, {size(part['bytes'])}"
        table.add_row("part", f"{part['number']} of {part['count']}: {amount}")
    return table


def _ranks_table(value: dict[str, Any]) -> Table:
    table = _head(value)
    for rank in value["ranks"]:
        moe = rank["moe"]
        sizes = f"{moe['experts']} experts, H {moe['hidden_size']}, I {moe['intermediate_size']}"
        table.add_row(Path(rank["output"]).name, f"{sizes}, {plural(rank['shards'], 'shard')}, {size(rank['bytes'])}")
    return table


def _head(value: dict[str, Any]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim")
    table.add_column(overflow="fold")
    scheme = f", quantized to {value['scheme']}" if value["quantized"] else f" ({value['scheme']})"
    table.add_row("source", Text(printable(value["source"]) + scheme))
    table.add_row("output", Text(printable(value["output"])))
    return table
