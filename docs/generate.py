"""Make the parts of the documents that come from tables in the code.

Usage: python docs/generate.py [--check]

Between ``<!-- begin NAME -->`` and ``<!-- end NAME -->`` the text is replaced; ``--check`` only says whether it would.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from quarkconv.findings import CODES
from quarkconv.inspection.engines import engine_facts
from quarkconv.targets import TARGETS

ROOT = Path(__file__).resolve().parents[1]


def findings() -> str:
    """The table of finding codes."""
    rows = ["| code | severity | meaning | conversion |", "| --- | --- | --- | --- |"]
    for name, code in CODES.items():
        refused = "" if code.blocks is None else f"refused, exit {code.blocks.exit_code}"
        rows.append(f"| `{name}` | {code.severity} | {code.meaning} | {refused} |")
    return "\n".join(rows)


def engines() -> str:
    """The table of engines."""
    rows = ["| engine | version | checkpoint as | runs as | only for | note | evidence |", "|" + " --- |" * 7]
    for fact in engine_facts():
        only = ", ".join([*fact.schemes, *fact.layouts, *fact.model_types, *(f"not {m}" for m in fact.not_model_types)])
        cells = [fact.engine, fact.version, fact.form, f"**{fact.verdict}**", only, fact.note, fact.proof]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def targets() -> str:
    """The table of targets."""
    rows = ["| target | what it is |", "| --- | --- |"]
    rows += [f"| `{name}` | {target.summary} |" for name, target in TARGETS.items()]
    return "\n".join(rows)


PARTS = {"findings": findings, "engines": engines, "targets": targets}
DOCUMENTS = ["README.md", "docs/findings.md", "docs/engines.md"]


def filled(text: str) -> str:
    """A document with its generated parts made anew."""
    for name, make in PARTS.items():
        pattern = re.compile(rf"(<!-- begin {name} -->\n).*?(<!-- end {name} -->)", re.DOTALL)
        text = pattern.sub(lambda match, make=make: f"{match[1]}\n{make()}\n\n{match[2]}", text)
    return text


def main() -> int:
    """Write the documents, or with ``--check`` compare them; the exit code is 1 when they are not current."""
    stale = []
    for name in DOCUMENTS:
        path = ROOT / name
        before = path.read_text("utf-8")
        after = filled(before)
        if after != before:
            stale.append(name)
            if "--check" not in sys.argv:
                path.write_text(after, "utf-8")
    if stale:
        print(("not current, run `make docs`: " if "--check" in sys.argv else "made: ") + ", ".join(stale))
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
