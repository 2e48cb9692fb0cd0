"""Make docs/terminal.svg, the picture in the README: three commands, run for real, with excerpts of their output.

Usage: python docs/picture.py
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from io import StringIO
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests"))

from support.exports import FIXTURES, restore  # noqa: E402

WIDTH = 100
MODELS = {
    "mixtral-eager": FIXTURES["mixtral-quark0.13-eager-experts_left_bf16"],
    "mixtral": FIXTURES["mixtral-quark0.11-eager"],
}
"""Name in the picture -> a tiny export by Quark."""


class Shot(NamedTuple):
    """A command, its exit code, and the omitted part of its output.

    ``first`` matches the first omitted line, ``last`` the first line shown again; None for the end.
    """

    command: str
    code: int
    first: str | None
    last: str | None


SHOTS = [
    Shot("quarkconv inspect mixtral-eager", 1, r"  ! expert-names", None),
    Shot("quarkconv convert mixtral --to fused-int8", 0, r"  prove it", None),
    Shot("quarkconv verify mixtral-fused-int8 --source mixtral", 0, r"INT8 forward", r"✓ Verified"),
]


def main() -> None:
    """Run the commands in an empty folder, and save their output."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    with tempfile.TemporaryDirectory() as folder:
        for name, fixture in MODELS.items():
            restore(fixture, Path(folder) / name)
        for shot in SHOTS:
            done = subprocess.run(
                shot.command.split(), cwd=folder, env=environment, capture_output=True, text=True, check=False
            )
            if done.returncode != shot.code:
                raise SystemExit(f"{shot.command}: exit {done.returncode}\n{done.stderr}")
            console.print(Text(f"$ {shot.command}", style="bold blue"))
            console.print(_excerpt(Text.from_ansi(done.stdout), shot))
    svg = console.export_svg(title="quarkconv", unique_id="q")  # a short id, since every run of text has it
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # fonts would be fetched
    # Each run of text is clipped to its line, and each line ends with an empty run: half of the file, and invisible.
    svg = re.sub(r'<clipPath id="q-line-\d+">.*?</clipPath>\s*', "", svg, flags=re.DOTALL)
    svg = re.sub(r' clip-path="url\(#q-line-\d+\)"', "", svg)
    svg = re.sub(r"<text [^>]*>\n</text>", "", svg)
    (ROOT / "docs" / "terminal.svg").write_text(svg.replace("&#160;", "\u00a0"), "utf-8")


def _excerpt(output: Text, shot: Shot) -> Text:
    """The output without empty lines, and without the part that is left out."""
    lines = [line for line in output.split("\n") if line.plain.strip()]
    count = len(lines)
    start = next((at for at, line in enumerate(lines) if shot.first and re.match(shot.first, line.plain)), count)
    end = next((at for at, line in enumerate(lines) if shot.last and re.match(shot.last, line.plain)), count)
    dots = [Text("  ...", style="dim")] if start < end else []
    return Text("\n").join([*lines[:start], *dots, *lines[max(start, end) :]])


if __name__ == "__main__":
    main()
