"""Commands of the program, run in this process at a width of 100 columns."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from support.commands import Result, Run
from support.program import run_cli

from quarkconv.cli.out import console


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Run]:
    """Run a command of ``quarkconv`` in this process."""
    monkeypatch.setenv("COLUMNS", "100")
    console.cache_clear()  # another test of this process may have created it for another width

    def invoke(*arguments: str | Path) -> Result:
        return Result(*run_cli(capsys, *arguments))

    yield invoke
    console.cache_clear()
