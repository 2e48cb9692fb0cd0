"""Make docs/terminal.svg, the picture in the README: the demo, run for real, as a terminal shows it.

Usage: python docs/picture.py
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from io import StringIO
from pathlib import Path

from rich.console import Console
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
WIDTH = 104
ENGINE_LINES = 4
MODEL = "qwen3_moe-quark0.13-f2f"
COMMANDS = [
    ["quarkconv", "inspect", MODEL],
    ["quarkconv", "convert", MODEL, "--to", "fused-int8"],
    ["quarkconv", "verify", f"{MODEL}-fused-int8", "--source", MODEL],
]


def main() -> None:
    """Run the commands beside a copy of the example, and save what they print."""
    console = Console(record=True, width=WIDTH, file=StringIO(), force_terminal=True)
    environment = {**os.environ, "FORCE_COLOR": "1", "COLUMNS": str(WIDTH), "TERM": "xterm-256color"}
    with tempfile.TemporaryDirectory() as folder:
        shutil.copytree(ROOT / "examples" / MODEL, Path(folder) / MODEL)
        for command in COMMANDS:
            done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=True)
            console.print(Text(f"$ {' '.join(command)}", style="bold blue"))
            console.print(_shortened(Text.from_ansi(done.stdout)))
    svg = console.export_svg(title="quarkconv", unique_id="q")  # a name that stands at every run of text
    svg = re.sub(r"\s*@font-face \{.*?\}", "", svg, flags=re.DOTALL)  # fetched from elsewhere
    # Each run of text is cut to its line, and each line ends with an empty run: half of the file, and nothing to see.
    svg = re.sub(r'<clipPath id="q-line-\d+">.*?</clipPath>\s*', "", svg, flags=re.DOTALL)
    svg = re.sub(r' clip-path="url\(#q-line-\d+\)"', "", svg)
    svg = re.sub(r"<text [^>]*>\n</text>", "", svg)
    (ROOT / "docs" / "terminal.svg").write_text(svg.replace("&#160;", "\u00a0"), "utf-8")


def _shortened(output: Text) -> Text:
    """What a command printed, with the first rows of the table of engines only: whole, it is half of the picture."""
    lines = output.split("\n", allow_blank=True)
    first = next((at for at, line in enumerate(lines) if line.plain.startswith(" engine ")), len(lines))
    end = next((at for at in range(first, len(lines)) if not lines[at].plain.strip()), len(lines))
    kept = min(first + 2 + ENGINE_LINES, end)
    while kept < end and lines[kept].plain.startswith("  "):  # the rest of a row
        kept += 1
    cut = [Text(" ...", style="dim")] if kept < end else []
    return Text("\n").join([*lines[:kept], *cut, *lines[end:]])


if __name__ == "__main__":
    main()
