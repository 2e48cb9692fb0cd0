"""The output of ``tune`` in a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Final

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from quarkconv.tune.tune import WrittenTable

_USES: Final = {
    "vllm": "VLLM_TUNED_CONFIG_FOLDER={folder} vllm serve ...",
    "sglang": "SGLANG_MOE_CONFIG_DIR={folder} python -m sglang.launch_server ...",
}
"""Engine -> the command that uses a folder of tables."""


def render_tables(engine: str, folder: Path | None, tables: list[WrittenTable]) -> RenderableType:
    """The files; of an engine, how much faster each number of tokens became, and how to use the folder."""
    if engine not in _USES:
        return Text(str(tables[0].path))
    parts: list[RenderableType] = []
    for table in tables:
        parts += [Text(str(table.path), style="bold"), Text(f"  {table.shape}", style="dim"), _rows(table)]
    return Group(*parts, Text(f"\nuse: {_USES[engine].format(folder=folder)}"))


def _rows(table: WrittenTable) -> RenderableType:
    grid = Table.grid(padding=(0, 2))
    for name in ("  tokens", "by default", "tuned", "times"):
        grid.add_column(name, justify="right")
    grid.add_row("  tokens", "by default", "tuned", "times as fast")
    for tokens, each in sorted(table.timings.items()):
        ratio = each.default_us / each.tuned_us
        grid.add_row(f"  {tokens}", f"{each.default_us:.0f} us", f"{each.tuned_us:.0f} us", f"{ratio:.2f}")
    return grid
