"""Errors and the findings that become errors: which files they name, and which findings refuse a checkpoint."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from quarkconv.errors import SourceError, UnsupportedError, naming_files_in
from quarkconv.findings import CODES, Severity, finding, refusal

PACKAGE = Path(__file__).resolve().parents[1] / "quarkconv"
WITH_NEXT_STEP = {"SourceError", "HubError", "UnsupportedError", "WriteError"}


@pytest.mark.parametrize(
    ("file", "named"),
    [
        ("config.json", "model/config.json"),
        ("model/config.json", "model/config.json"),
        ("model", "model"),
        ("/blobs/abc", "/blobs/abc"),
        ("s3://bucket/config.json", "s3://bucket/config.json"),
        (None, None),
    ],
)
def test_an_error_names_its_file_by_a_path_once(file: str | None, named: str | None) -> None:
    with pytest.raises(SourceError) as caught, naming_files_in("model"):
        raise SourceError("The file cannot be read", code="shard-missing", file=file)
    assert caught.value.file == named


@pytest.mark.parametrize("code", [code for code, row in CODES.items() if row.blocks is not None])
def test_a_finding_that_only_informs_refuses_nothing(code: str) -> None:
    informs = finding(code, "model.layers.0.mlp", "It is so", severity=Severity.INFO)
    assert refusal([informs], "model", "source", "converted") is None
    blocks = finding(code, "model.layers.0.mlp", "It is so", severity=Severity.ERROR)
    error = refusal([informs, blocks], "model", "source", "converted")
    assert isinstance(error, SourceError | UnsupportedError)
    assert type(error) is CODES[code].blocks
    assert error.hint is not None


def test_every_error_about_a_source_or_an_output_gives_a_next_step() -> None:
    calls = [
        (f"{path.relative_to(PACKAGE)}:{node.lineno}", {keyword.arg for keyword in node.keywords})
        for path in sorted(PACKAGE.rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text("utf-8")))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in WITH_NEXT_STEP
    ]
    assert len(calls) > 100
    assert [where for where, parts in calls if not parts & {"hint", None}] == []
