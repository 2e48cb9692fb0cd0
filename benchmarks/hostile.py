"""What files cost that were made to cost much: processor time and memory of `quarkconv inspect`, each in a process.

Usage: python benchmarks/hostile.py
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))

from support.bombs import BOMBS
from support.hostile import measured
from support.raw import write_json


def main() -> None:
    """Measure each, and print a table."""
    print("| input | MB | exit | seconds of processor time | MB of memory |\n| --- | --: | --: | --: | --: |")
    with tempfile.TemporaryDirectory() as temporary:
        for number, (name, make) in enumerate(BOMBS.items()):
            folder = Path(temporary) / str(number)
            folder.mkdir()
            write_json(folder / "config.json", {})
            make()(folder)
            nbytes = sum(path.stat().st_size for path in folder.iterdir())
            runs = [measured("inspect", folder, "--json", timeout=120) for _ in range(1)]
            seconds = sorted(run.seconds for run in runs)[0]
            megabytes = max(run.megabytes for run in runs)
            print(f"| {name} | {nbytes / 1e6:.1f} | {runs[0].code} | {seconds:.2f} | {megabytes:.0f} |", flush=True)
            for path in folder.iterdir():
                path.unlink()


if __name__ == "__main__":
    main()
