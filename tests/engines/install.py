"""Put each engine's released package into a folder of its own, to be put before the development environment.

    python tests/engines/install.py FOLDER [ENGINE...]

For each folder beside this file that has a requirements.txt, FOLDER/<name> gets the packages that it lists, at exactly
those versions and without what they depend on: the list is complete for what the tests import. Packages under
``# source only`` are wheels of which only Python sources and metadata are kept: what they hold beside that is built for
GPUs, and large (vLLM: 1 GB).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARK = "# source only"
STAMP = "installed.txt"
SOURCES = (".py", ".pyi", ".json", ".typed", ".h", ".cuh")


def install(requirements: Path, folder: Path) -> None:
    """Make ``folder`` hold exactly what a requirements.txt lists; leaves a folder alone that does."""
    wanted = requirements.read_text()
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == wanted:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    libraries, _, sources = wanted.partition(MARK)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    with tempfile.TemporaryDirectory() as scratch:
        for text, command in (
            (libraries, ["install", "--no-compile", "--target", str(folder)]),
            (sources, ["download", "-d", scratch]),
        ):
            if not [line for line in text.splitlines() if line and not line.startswith("#")]:
                continue
            listed = Path(scratch) / "listed.txt"
            listed.write_text(text)
            subprocess.run([*pip, *command, "--quiet", "--no-deps", "-r", str(listed)], check=True)
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(SOURCES) or ".dist-info/" in name]
                archive.extractall(folder, names)
    stamp.write_text(wanted)


def main(folder: Path, engines: list[str]) -> None:
    """Install the named engines, or all."""
    for requirements in sorted(HERE.glob("*/requirements.txt")):
        name = requirements.parent.name
        if not engines or name in engines:
            install(requirements, folder / name)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
