"""The package's own structure: imports go one way, one signature, and every kernel gives its grid."""

import ast
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import quarkconv.kernels
from quarkconv.kernels import fused_experts_int8, fused_experts_int8_reference
from quarkconv.kernels.arguments import check_arguments

ROOT = Path(quarkconv.kernels.__file__).parent
LAYERS = (
    ("activations", "backend", "tables"),
    ("arguments", "options"),
    ("candidates",),
    ("jit",),
    ("launch",),
    ("quantize", "reference", "pipeline"),
    ("forward",),
    ("custom_op",),
    ("experts", "warm_up"),
    ("__init__", "tune"),
)
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
PATHS = sorted(ROOT.rglob("*.py"))


def imported(path: Path) -> Iterator[tuple[str, ...]]:
    """(module, or package and module, of quarkconv.kernels) that a file imports, also inside of functions."""
    package = path.parent.relative_to(ROOT).parts
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) + 1 - node.level]
            yield from [(*base, *node.module.split("."))] if node.module else [(*base, a.name) for a in node.names]


def own_name(path: Path) -> tuple[str, ...]:
    return path.relative_to(ROOT).with_suffix("").parts


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    own = own_name(path)
    for module in imported(path):
        if module[0] != own[0]:
            assert RANK[module[0]] < RANK[own[0]], f"{'.'.join(own)} imports {'.'.join(module)}"


def test_imports_have_no_circle() -> None:
    graph = {own_name(path): set(imported(path)) for path in PATHS}
    while graph:
        leaves = [name for name, imports in graph.items() if not imports & graph.keys()]
        assert leaves, f"a circle among {sorted('.'.join(name) for name in graph)}"
        for name in leaves:
            del graph[name]


def test_operation_and_twin_have_one_signature() -> None:
    signature = inspect.signature(check_arguments)
    for operation in (fused_experts_int8, fused_experts_int8_reference):
        assert inspect.signature(operation).parameters == signature.parameters
    positional = [p.name for p in signature.parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["hidden_states", "w13", "w2", "w13_scale", "w2_scale", "topk_weights", "topk_ids"]


def kernels() -> Iterator[Any]:
    for path in sorted((ROOT / "jit").glob("*.py")):
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef) and node.name.endswith("_kernel"):
                yield pytest.param(node, id=node.name)


@pytest.mark.parametrize("node", list(kernels()))
def test_every_kernel_says_its_grid_and_what_a_program_computes(node: ast.FunctionDef) -> None:
    text = ast.get_docstring(node) or ""
    assert text.startswith("Grid: ("), node.name
    assert "program" in text, node.name
