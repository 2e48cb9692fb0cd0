"""Write the hashes of everything that continuous integration installs, for the Python and platform that this runs on.

The versions are those of constraints.txt. Run it, where CI runs, after a change of constraints.txt or pyproject.toml:

    .venv/bin/python .ci/lock.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
RESOLVE = ["install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-", "-c", "constraints.txt"]
APART = {"torch"}
"""What has builds of its own for each kind of machine: a file of its own."""


def main() -> None:
    """Ask pip what it would install, and write it down."""
    packages = ["-e", ".[dev]", "setuptools>=77"]
    command = [sys.executable, "-m", "pip", *RESOLVE, *packages]
    report = json.loads(subprocess.run(command, cwd=HERE.parent, check=True, capture_output=True).stdout)
    lines: dict[str, list[str]] = {"requirements.txt": [], "torch.txt": []}
    for item in report["install"]:
        if item["is_direct"]:
            continue
        name, version = item["metadata"]["name"], item["metadata"]["version"]
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        lines["torch.txt" if name in APART else "requirements.txt"].append(f"{name}=={version} --hash=sha256:{digest}")
    version = ".".join(map(str, sys.version_info[:2]))
    for file, found in lines.items():
        head = f"# Made by .ci/lock.py for CPython {version} on Linux, x86_64. Do not edit.\n"
        (HERE / file).write_text(head + "\n".join(sorted(found, key=str.lower)) + "\n")


if __name__ == "__main__":
    main()
