"""Imports go one way, torch is imported only where it is needed, and the package list names every package."""

from __future__ import annotations

import ast
import json
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.checkpoints import make_checkpoint
from support.program import PROCESS_TIMEOUT, utf8_environment

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "quarkconv"
KERNELS = ROOT / "kernels" / "src"

LAYERS = (
    ("errors", "progress", "text", "version"),
    ("dtypes", "findings", "defects", "cluster"),
    ("files",),
    ("cloud", "modelscope"),
    ("headers", "hub"),
    ("scheme",),
    ("experts",),
    ("description",),
    ("plan",),
    ("targets",),
    ("write", "load"),
    ("convert", "verify"),
    ("inspection", "integrations", "evaluate", "tune"),
    ("__init__",),
    ("report",),
    ("cli",),
    ("__main__",),
)
"""The layers of quarkconv from the bottom up; a module imports from its own package and from layers below."""
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}


def imported(path: Path) -> Iterator[str]:
    """The modules that a file imports, anywhere in it, by their full names."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0 or path.is_relative_to(KERNELS), f"{path} imports relatively"
            base = node.module or ""
            if node.level:
                package = ("quarkconv", "kernels", *path.parent.relative_to(KERNELS).parts)
                assert node.level <= len(package) - 1, f"{path} imports from outside of quarkconv.kernels"
                parts = package[: len(package) - node.level + 1]
                base = ".".join((*parts, node.module) if node.module else parts)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def part(module: str) -> str | None:
    """The layer of a module of quarkconv: ``plan`` for ``quarkconv.plan.pieces.Plan``."""
    parts = module.split(".")
    if parts[0] != "quarkconv":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in {*RANK, "kernels"} else "__init__"


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path.name != "__init__.py" or path.parent == PACKAGE]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_imports_go_one_way(path: Path) -> None:
    relative = path.relative_to(PACKAGE)
    own = relative.parts[0].removesuffix(".py")
    assert own in RANK, f"{own} has no place in LAYERS"
    for module in imported(path):
        layer = part(module)
        if layer is None or layer == own:
            continue
        if layer == "kernels":
            assert own in ("verify", "evaluate", "tune", "integrations"), f"{relative} imports {module}"
            continue
        assert RANK[layer] < RANK[own], f"{relative} imports {module}"


def test_packages_stand_on_at_most_ten_floors() -> None:
    """A package stands a floor above the highest one that it imports."""
    below: dict[str, set[str]] = {}
    for path in MODULES:
        own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        others = {part(module) for module in imported(path)} - {own}
        below.setdefault(own, set()).update(name for name in others if name in RANK and name is not None)
    floors: dict[str, int] = {}
    for name in (name for names in LAYERS for name in names):
        floors[name] = 1 + max((floors[other] for other in below[name]), default=0)
    assert max(floors[name] for name in floors.keys() - {"__main__"}) <= 10, floors


def test_verification_shares_no_code_with_writing() -> None:
    for path in (PACKAGE / "verify").rglob("*.py"):
        assert not [module for module in imported(path) if module.startswith("quarkconv.write")], path


def test_the_kernels_know_nothing_of_the_rest() -> None:
    paths = list(KERNELS.rglob("*.py"))
    assert paths
    for path in paths:
        others = [name for name in imported(path) if name.startswith("quarkconv")]
        assert all(name.startswith("quarkconv.kernels.") for name in others), f"{path.name} imports {others}"


def test_click_is_left_to_typer() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert not [name for name in imported(path) if name.split(".")[0] == "click"], path


def test_the_package_list_equals_the_tree() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    mapped = {name: ROOT / folder for name, folder in setuptools["package-dir"].items()}
    assert mapped == {"quarkconv.kernels": KERNELS}
    folders = {path.parent: ("quarkconv", *path.parent.relative_to(PACKAGE).parts) for path in PACKAGE.rglob("*.py")}
    folders |= {
        path.parent: ("quarkconv", "kernels", *path.parent.relative_to(KERNELS).parts) for path in KERNELS.rglob("*.py")
    }
    modules, data = {".".join(parts) for parts in folders.values()}, {"kernels.tables", "tune.tables.vllm"}
    assert sorted(setuptools["packages"]) == sorted(modules | {f"quarkconv.{name}" for name in data})
    for folder in folders:
        assert (folder / "__init__.py").is_file(), folder
    assert not (ROOT / "kernels" / "__init__.py").exists()  # PyPI has another package of that name


def test_package_data_exists() -> None:
    setuptools = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["setuptools"]
    for package, names in setuptools["package-data"].items():
        folder = ROOT / package.replace(".", "/").replace("quarkconv/kernels", "kernels/src")
        for name in names:
            assert any(path.is_file() for path in folder.glob(name)), f"{package}: {name}"


REPORT = """
import json, sys
{code}
print()
print(json.dumps(sorted(name for name in ("torch", "triton", "numpy", "safetensors") if name in sys.modules)))
"""
RUN = """
from quarkconv.cli.main import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    assert stop.code == 0, stop.code
"""


def heavy_imports(code: str, *args: str | Path) -> list[str]:
    command = [sys.executable, "-c", REPORT.format(code=code), *map(str, args)]
    environment = utf8_environment()
    run = subprocess.run(command, capture_output=True, env=environment, timeout=PROCESS_TIMEOUT, check=True)
    names: list[str] = json.loads(run.stdout.splitlines()[-1])
    return names


def test_the_check_below_can_fail() -> None:
    assert heavy_imports("import safetensors") == ["safetensors"]


def test_importing_quarkconv_imports_no_torch() -> None:
    assert heavy_imports("import quarkconv; quarkconv.inspect_checkpoint; quarkconv.convert_checkpoint") == []


def test_no_command_but_verify_imports_torch(tmp_path: Path) -> None:
    model = make_checkpoint(tmp_path / "model")
    out = tmp_path / "out"
    assert heavy_imports(RUN, "--help") == []
    assert heavy_imports(RUN, "inspect", model) == []
    assert heavy_imports(RUN, "inspect", model, "--deep", "--json") == []
    assert heavy_imports(RUN, "convert", model, "--to", "fused-int8", "--dry-run") == []
    assert heavy_imports(RUN, "convert", model, "--to", "fused-int8", "--out", out) == []
    assert heavy_imports(RUN, "inspect", out) == []
