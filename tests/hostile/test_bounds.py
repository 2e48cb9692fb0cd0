"""Small files that would take a careless reader minutes or gigabytes; `benchmarks/hostile.py` measures the seconds."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from support.bombs import BOMBS
from support.hostile import MEGABYTES, measured
from support.raw import write_json

CHOSEN = (
    "one tensor of 900,000 dimensions", "5,000 dimensions of 2,000 digits", "a header of brackets",
    "a config of objects", "an index of 300,000 shards", "an expression that never ends",
)  # fmt: skip
"""Of each kind one; all of them with HOSTILE_ALL."""


@pytest.mark.parametrize("name", BOMBS if os.environ.get("HOSTILE_ALL") else CHOSEN)
def test_inputs_made_to_exhaust_memory_stay_within_bounds(name: str, tmp_path: Path) -> None:
    write_json(tmp_path / "config.json", {})
    BOMBS[name]()(tmp_path)
    before = sorted(tmp_path.iterdir())
    done = measured("inspect", tmp_path, "--json", timeout=60)
    # Channel INT8 needs no quantization_config: a large config without one is a warning, exit 0.
    assert done.code in ((0, 1, 3) if name == "a config of objects" else (1, 3)), done.stderr
    value = json.loads(done.stdout)
    assert len(done.stdout) < 200_000
    assert value.get("findings") or value["error"]
    assert done.megabytes < MEGABYTES
    assert sorted(tmp_path.iterdir()) == before
