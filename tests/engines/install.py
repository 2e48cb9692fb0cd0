"""Put each engine's released package into a folder of its own, to be put before the development environment.

    python tests/engines/install.py FOLDER [ENGINE...]
    python tests/engines/install.py --lock

For each folder beside this file that has a requirements.txt, FOLDER/<name> gets the packages that it lists, at exactly
those versions and without what they depend on: the list is complete for what the tests import. Packages under
``# source only`` are wheels of which only Python sources and metadata are kept: what they hold beside that is built for
GPUs, and large (vLLM: 1 GB).

On CPython 3.11 on Linux, x86_64, nothing is installed but what has the hash in hashes.txt, which ``--lock`` writes on
such a machine.
"""

from __future__ import annotations

import json
import platform
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
MARK = "# source only"
STAMP = "installed.txt"
HASHES = "hashes.txt"
SOURCES = (".py", ".pyi", ".json", ".typed", ".h", ".cuh")
PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
HASHED = (platform.system(), platform.machine(), *sys.version_info[:2]) == ("Linux", "x86_64", 3, 11)


def listed(text: str) -> list[str]:
    """The requirements of a file, without comments."""
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def install(requirements: Path, folder: Path) -> None:
    """Make ``folder`` hold exactly what a requirements file lists; leaves a folder alone that does."""
    expected = requirements.read_text()
    stamp = folder / STAMP
    if stamp.exists() and stamp.read_text() == expected:
        return
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    libraries, _, sources = expected.partition(MARK)
    hashes = ["--require-hashes"] if requirements.name == HASHES else []
    with tempfile.TemporaryDirectory() as scratch:
        for text, command in (
            (libraries, ["install", "--no-compile", "--target", str(folder)]),
            (sources, ["download", "-d", scratch]),
        ):
            if listed(text):
                part = Path(scratch) / "listed.txt"
                part.write_text(text)
                subprocess.run([*PIP, *command, *hashes, "--quiet", "--no-deps", "-r", str(part)], check=True)
        for wheel in Path(scratch).glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                names = [name for name in archive.namelist() if name.endswith(SOURCES) or ".dist-info/" in name]
                archive.extractall(folder, names)
    stamp.write_text(expected)


def lock(requirements: Path) -> None:
    """Write hashes.txt beside a requirements.txt."""
    parts = []
    command = [*PIP, "install", "--dry-run", "--ignore-installed", "--quiet", "--no-deps", "--report", "-"]
    for text in requirements.read_text().split(MARK):
        names = listed(text)
        report = subprocess.run([*command, *names], check=True, capture_output=True).stdout if names else b"{}"
        lines = []
        for item in json.loads(report).get("install", []):
            digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
            lines.append(f"{item['metadata']['name']}=={item['metadata']['version']} --hash=sha256:{digest}")
        parts.append("\n".join(sorted(lines, key=str.lower)) + "\n")
    head = "# Made by tests/engines/install.py --lock for CPython 3.11 on Linux, x86_64. Do not edit.\n"
    requirements.with_name(HASHES).write_text(head + f"\n{MARK}\n".join(parts))


def _check(requirements: Path) -> None:
    """Complain of a hashes.txt that is not about a requirements.txt."""
    hashed = {line.split()[0] for line in listed(requirements.with_name(HASHES).read_text())}
    names = (set(listed(requirements.read_text())), hashed)
    expected, found = ({name.lower().replace("_", "-") for name in each} for each in names)
    if expected != found:
        sys.exit(
            f"{requirements}: {sorted(expected ^ found)} differ from {HASHES}: run tests/engines/install.py --lock"
        )


def main(arguments: list[str]) -> None:
    """Install the named engines, or all; or write their hashes."""
    for requirements in sorted(HERE.glob("*/requirements.txt")):
        name = requirements.parent.name
        if arguments == ["--lock"]:
            lock(requirements)
        elif not arguments[1:] or name in arguments[1:]:
            _check(requirements)
            install(requirements.with_name(HASHES) if HASHED else requirements, Path(arguments[0]) / name)


if __name__ == "__main__":
    main(sys.argv[1:])
